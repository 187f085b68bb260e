//! Checks that the fault matrix, `FAULTS.md`, names existing tests and every fault test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn source(module: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration").join(module);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("failed to read {}: {e}", path.display()))
}

/// The tests of a module, in the notation of the matrix.
fn tests_of(module: &str) -> BTreeSet<String> {
    let source = source(&format!("{}.rs", module.replace("::", "/")));
    let name = |line: &str| line.trim().strip_prefix("fn ")?.split_once('(').map(|(name, _)| name.to_owned());
    let tests = source.split("#[test]").skip(1).filter_map(|test| test.lines().find_map(name));
    tests.map(|test| format!("{module}::{test}")).collect()
}

/// The names between backticks in a row's last cell.
fn named_in(row: &str) -> BTreeSet<String> {
    let last = row.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap_or_default();
    last.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn fault_matrix_names_existing_tests_and_every_fault_test() {
    let matrix = source("FAULTS.md");
    let rows: Vec<&str> =
        matrix.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| fault")).collect();
    assert!(rows.len() > 30, "{} rows", rows.len());
    let mut named = BTreeSet::new();
    for row in rows {
        let tests = named_in(row);
        assert!(!tests.is_empty(), "no test stands behind {row}");
        for test in tests {
            let (module, _) = test.rsplit_once("::").unwrap_or_else(|| panic!("`{test}` is not `module::test`"));
            assert!(tests_of(module).contains(&test), "there is no test `{test}`");
            named.insert(test);
        }
    }
    let modules = ["cancel", "crash", "failover", "faults_backend", "faults_box", "faults_coordinator", "health"];
    let field = ["answers", "health", "machine", "neighbors", "network", "offer", "requests", "root"];
    for module in modules.map(str::to_owned).into_iter().chain(field.map(|name| format!("field::{name}"))) {
        let unnamed: Vec<String> = tests_of(&module).difference(&named).cloned().collect();
        assert!(unnamed.is_empty(), "no row names {unnamed:?}");
    }
}

//! The identity file, in the format of 0.3.5.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::config::data_files;
use crate::support::*;

/// Test vector 1 of RFC 8032, the key in the files of `tests/data/identity/valid`.
const PUBLIC: &str = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
const SECRET: &str = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=";

/// A setup whose identity file has this content.
fn with_identity(url: &str, content: &[u8]) -> Setup {
    let setup = Setup::new(url);
    setup.scratch.write(".usepod-agent/identity.key", content);
    setup
}

/// Runs `enroll` with a setup's files.
fn enroll(setup: &Setup) -> Ran {
    let config = setup.write();
    let arguments = ["enroll", "--allow-insecure", "--config", config.to_str().expect("UTF-8")];
    cli(setup.scratch.path(), &arguments, &[])
}

#[test]
fn valid_files_give_the_same_key() {
    for file in data_files("identity/valid", 8) {
        let content = fs::read(&file).expect("a data file");
        let Ran { code, stdout, stderr } = enroll(&with_identity("ws://127.0.0.1:1/", &content));
        let name = file.display();
        assert_eq!(code, Some(0), "{name}: {stderr}");
        assert!(stdout.lines().any(|line| line == format!("public_key: {PUBLIC}")), "{name}: {stdout}");
        let id =
            if String::from_utf8_lossy(&content).contains("provider_id") { "prov_123" } else { "<not yet enrolled>" };
        assert!(stdout.lines().any(|line| line == format!("provider_id: {id}")), "{name}: {stdout}");
        assert!(!stdout.contains(SECRET) && !stderr.contains(SECRET), "{name}: the seed was printed");
    }
}

#[test]
fn invalid_files_are_refused_by_name_and_left_unchanged() {
    for file in data_files("identity/invalid", 12) {
        let content = fs::read(&file).expect("a data file");
        let setup = with_identity("ws://127.0.0.1:1/", &content);
        let name = file.display();
        let Ran { code, stdout, stderr } = enroll(&setup);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{name}: {stderr}");
        assert!(stderr.contains("identity.key"), "{name}: the error names the file: {stderr}");
        assert!(!stderr.contains(&SECRET[..20]), "{name}: the seed was printed: {stderr}");
        assert_eq!(fs::read(setup.identity()).expect("the file"), content, "{name}");

        let mut agent = setup.start();
        assert_eq!(agent.wait(SOON).code(), Some(1), "{name}: run");
    }
}

#[test]
fn first_run_creates_a_private_file_in_the_format_of_0_3_5() {
    let setup = Setup::new("ws://127.0.0.1:1/");
    let Ran { code, stdout, stderr } = enroll(&setup);
    assert_eq!(code, Some(0), "{stderr}");
    let text = fs::read_to_string(setup.identity()).expect("the identity file");
    let lines: Vec<_> = text.lines().collect();
    let field = |n: usize, name: &str| {
        let value = lines.get(n).and_then(|line| line.strip_prefix(name)).and_then(|rest| rest.strip_prefix(": "));
        value.unwrap_or_else(|| panic!("line {n} should be `{name}: …`")).to_owned()
    };
    assert_eq!((lines[0], lines.len()), ("-----BEGIN USEPOD AGENT KEY-----", 6), "{}", lines.len());
    assert_eq!(lines[5], "-----END USEPOD AGENT KEY-----");
    assert_eq!(field(1, "version"), "1");
    let created = field(2, "created");
    assert!(created.ends_with("+00:00") && created.as_bytes()[10] == b'T', "{created}");
    assert_eq!(unbase64(&field(3, "secret")).len(), 32);
    assert_eq!(stdout.lines().next(), Some(format!("public_key: {}", field(4, "public")).as_str()));
    assert_eq!(mode(setup.identity()), 0o600, "the file's mode");
    assert!(!stdout.contains(&field(3, "secret")) && !stderr.contains(&field(3, "secret")), "the seed was printed");
    // A second run reads the same file.
    assert_eq!(enroll(&setup).stdout, stdout);
}

#[test]
fn keys_of_two_agents_differ() {
    let [first, second] = [(), ()].map(|()| enroll(&Setup::new("ws://127.0.0.1:1/")).stdout);
    assert_ne!(first.lines().next(), second.lines().next());
}

#[test]
fn key_path_is_honoured_and_its_tilde_expanded() {
    for path in ["~/keys/of/mine.key", "keys/of/mine.key"] {
        let setup = Setup::new("ws://127.0.0.1:1/").more(&format!("[identity]\nkey_path = \"{path}\""));
        let Ran { code, stderr, .. } = enroll(&setup);
        assert_eq!(code, Some(0), "{path}: {stderr}");
        assert!(setup.scratch.join("keys/of/mine.key").exists(), "{path}");
    }
}

#[test]
fn key_in_the_file_signs_and_a_new_provider_id_is_added_to_the_file() {
    let coordinator = Coordinator::new();
    let known =
        fs::read(data_files("identity/valid", 8).iter().find(|f| f.ends_with("unknown-lines.key")).expect("the file"));
    let setup = with_identity(&coordinator.url(), &known.expect("a data file"));
    let _agent = setup.start();
    let session = coordinator.accept();
    let auth = session.challenge(b"nonce");
    assert_eq!(auth["pubkey"], PUBLIC);
    verify_auth(&auth, b"nonce");
    session.send(&json!({"type": "auth_ok", "provider_id": "prov_new"}));
    // The file is written before the offer is sent.
    session.frame("capabilities", SOON);
    let text = fs::read_to_string(setup.identity()).expect("the identity file");
    for line in ["version: 1", "from_the_future: yes: and more", "note: kept", "provider_id: prov_new"] {
        assert!(text.lines().any(|l| l == line), "no `{line}` in the file");
    }
    assert!(text.contains(SECRET) && text.contains(PUBLIC) && !text.contains("prov_123"));
    assert_eq!(mode(setup.identity()), 0o600, "the file's mode");
    let names = names_in(setup.identity().parent().expect("a folder"));
    // The state file may be in the middle of its replacement.
    let is_kept = |name: &String| STATE_FILES.contains(&name.as_str()) || name == "identity.key.state.new";
    assert!(names.iter().all(is_kept), "{names:?}");
}

#[test]
fn file_is_not_rewritten_without_a_new_provider_id() {
    let coordinator = Coordinator::new();
    let file = &data_files("identity/valid", 8)[0];
    let content = fs::read(file).expect("a data file");
    let setup = with_identity(&coordinator.url(), &content);
    let _agent = setup.start();
    coordinator.session();
    assert_eq!(fs::read(setup.identity()).expect("the file"), content);
}

#[test]
fn symlink_is_followed_and_not_replaced() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let target =
        setup.scratch.write("elsewhere/real.key", fs::read(&data_files("identity/valid", 8)[0]).expect("a file"));
    fs::create_dir_all(setup.scratch.join(".usepod-agent")).expect("the folder");
    symlink(&target, setup.identity()).expect("a symlink");
    let _agent = setup.start();
    coordinator.accept().authenticate(Some("prov_linked"));
    assert!(fs::symlink_metadata(setup.identity()).expect("the link").is_symlink());
    assert!(fs::read_to_string(target).expect("the target").contains("provider_id: prov_linked"));
}

/// Like a full or read-only disk; here the folder itself is missing.
#[test]
fn agent_that_cannot_write_the_file_serves_with_the_new_provider_id() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).coordinator("enrollment_code = \"POD-ENROLL-abc\"");
    let agent = setup.start();
    let session = coordinator.accept();
    assert_eq!(session.challenge(b"1")["enrollment_code"], "POD-ENROLL-abc");
    fs::remove_dir_all(setup.scratch.join(".usepod-agent")).expect("the folder is there");
    session.send(&json!({"type": "auth_ok", "provider_id": "prov_kept"}));
    session.frame("capabilities", SOON);
    agent.stderr.wait_line(&["warn", "provider id"]);
    session.close(1001, "drain:deploy");
    assert_eq!(coordinator.accept().challenge(b"2").get("enrollment_code"), None, "it knows its provider_id");
}

#[test]
fn identity_that_cannot_be_created_is_a_runtime_error() {
    let setup = Setup::new("ws://127.0.0.1:1/").more("[identity]\nkey_path = \"agent.toml/identity.key\"");
    let Ran { code, stderr, .. } = enroll(&setup);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(Path::new("agent.toml/identity.key").to_str().expect("UTF-8")), "{stderr}");
}

#[test]
fn slow_simultaneous_first_starts_share_the_one_key_on_disk() {
    for round in 0..40 {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url());
        let config = setup.write();
        let start = |command| {
            let arguments = [command, "--allow-insecure", "--config", config.to_str().expect("UTF-8")];
            Agent::run(setup.scratch.path(), &arguments)
        };
        let enroll_all = |count| (0..count).map(|_| start("enroll")).collect::<Vec<_>>();
        // In varying order, as the first one usually wins.
        let mut enrolling = enroll_all(round % 4);
        let agent = start("run");
        enrolling.extend(enroll_all(3 - round % 4));
        let served = coordinator.accept().challenge(b"nonce")["pubkey"].clone();
        let served = format!("public: {}", served.as_str().expect("a public key"));
        for enroll in &mut enrolling {
            assert_eq!(enroll.wait(SOON).code(), Some(0), "enroll failed in round {round}: {}", enroll.stderr.text());
            let printed = enroll.stdout.wait_line(&["public_key: "]).replace("public_key", "public");
            assert_eq!(printed, served, "what enroll printed in round {round}");
        }
        let text = fs::read_to_string(setup.identity()).expect("the identity file");
        assert!(text.lines().any(|line| line == served), "round {round}: served {served}, on disk is\n{text}");
        drop(agent);
        // The agent may have been killed while it wrote the state file.
        let names = names_in(&setup.scratch.join(".usepod-agent"));
        let is_kept = |name: &String| STATE_FILES.contains(&name.as_str()) || name == "identity.key.state.new";
        assert!(names.iter().all(is_kept), "round {round}: {names:?}");
    }
}

#[test]
fn provider_id_of_any_content_leaves_the_file_readable() {
    let [long, longer] = [50_000, 100_000].map(|length| "x".repeat(length));
    let ids = [
        &long,
        &longer,
        "two\nlines",
        "carriage\rreturn",
        " padded ",
        "\u{feff}",
        "-----END USEPOD AGENT KEY-----",
        ": a: b",
    ];
    side_by_side(ids, |id| {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url());
        let pubkey = |session: &Session| {
            let auth = session.challenge(b"nonce");
            session.send(&json!({"type": "auth_ok", "provider_id": id}));
            // The file is written before the offer is sent.
            session.frame("capabilities", SOON);
            auth["pubkey"].as_str().expect("a public key").to_owned()
        };
        let what: String = id.chars().take(40).collect();
        let agent = setup.start();
        let first = pubkey(&coordinator.accept());
        drop(agent);
        let Ran { code, stdout, stderr } = enroll(&setup);
        assert_eq!(code, Some(0), "{what:?}: {stderr}");
        assert!(stdout.contains(&first), "{what:?}: {stdout}");
        let _agent = setup.start();
        assert_eq!(pubkey(&coordinator.accept()), first, "{what:?}");
    });
}

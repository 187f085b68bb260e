//! The `agent.toml` that `setup` leaves: what it changes, and what it keeps.

use super::*;

#[test]
fn handwritten_settings_survive_and_are_sent_to_the_coordinator() {
    let backend = Backend::vllm(&["m", "not-offered"]);
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = format!(
        "# mine\n[operator]\ndisplay_name = \"Rig\"\n[coordinator]\nurl = \"wss://old.example/\"\n\
         enrollment_code = \"POD-ENROLL-OLD\"\n[identity]\nkey_path = \"{}\"\n\
         [[backends]]\n{}\nmodels = [\"m\"]\nmax_concurrent = 3\n\
         [[backends]]\nkind = \"venice\"\napi_key_env = \"NOT_SET\"\nmarkup = 0.05\n\
         [pricing]\ndefault_input_per_1m = 111\ndefault_output_per_1m = 222\n\
         [pricing.models]\nm = {{ input_per_1m = 1 }}\nother = {{ input_per_1m = 5 }}\n\
         [limits]\nmax_concurrent = 99 # mine, too\ndrain_seconds = 7\n[my.own]\nkey = [1, 2]\n",
        home.join("keys/id.key").display(),
        backend.toml(),
    );
    let file = home.write("conf/agent.toml", &old);
    set_mode(&file, 0o644);
    let named = file.to_str().expect("UTF-8");
    let ran = set_up(&home, &server.url(), &["--config", named]);
    assert_done(&ran);
    assert!(home.join("keys/id.key").exists() && !home.join(".usepod-agent").exists());

    let printed = server.seen()[1].json()["capabilities"]["backends"].clone();
    let ours = printed.as_array().expect("a list").iter().find(|b| b["url"] == backend.url().as_str());
    assert_eq!(ours, Some(&json!({"kind": "vllm", "url": backend.url(), "models": ["m"]})), "{printed}");

    let new = text(&file);
    for kept in [
        "display_name = \"Rig\"",
        "models = [\"m\"]",
        "max_concurrent = 3\n",
        "api_key_env = \"NOT_SET\"",
        "markup = 0.05",
        "default_input_per_1m = 111\n",
        "other = { input_per_1m = 5 }",
        "drain_seconds = 7",
        "[my.own]\nkey = [1, 2]",
        "m = { input_per_1m = 300000, output_per_1m = 450000 }",
        "max_concurrent = 6 # mine, too\n",
        "# mine\n[operator]\n",
    ] {
        assert!(new.contains(kept), "no `{kept}` in {new}");
    }
    for gone in ["old.example", "POD-ENROLL", "max_concurrent = 99"] {
        assert!(!new.contains(gone), "`{gone}` in {new}");
    }
    assert!(ran.stdout.contains("m  input 0.30  output 0.45"), "{}", ran.stdout);
    assert!(ran.stdout.contains(&format!("usepod-agent service install --config {named}\n")), "{}", ran.stdout);
    let bak = home.join("conf/agent.toml.bak");
    assert_eq!(text(&bak), old);
    assert_eq!((mode(&file), mode(&bak)), (0o600, 0o600));

    // A second, identical pairing writes nothing.
    assert_done(&set_up(&home, &server.url(), &["--config", named]));
    assert_eq!((text(&file), text(&bak)), (new.clone(), old.clone()));
    // A third one keeps the first backup.
    let edited = format!("{}# edited\n", new.replace("max_concurrent = 6", "max_concurrent = 7"));
    fs::write(&file, &edited).expect("an edit");
    assert_done(&set_up(&home, &server.url(), &["--config", named]));
    assert_eq!(text(&file), format!("{new}# edited\n"));
    assert_eq!((text(&bak), text(home.join("conf/agent.toml.bak.1"))), (edited, old));
}

#[test]
fn edit_during_the_pairing_is_not_lost() {
    let home = Scratch::new();
    let pricing = "[coordinator]\nurl = \"wss://h/\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = ";
    let (old, edited) = (format!("{pricing}2\n"), format!("{pricing}3\n# mine\n"));
    let file = home.write(USUAL, &old);
    let (edit, place) = (edited.clone(), file.clone());
    let server = coordinator(move |_| {
        fs::write(&place, &edit).expect("an edit");
        active()
    });
    assert_done(&set_up(&home, &server.url(), &[]));
    for kept in ["default_output_per_1m = 3\n", "# mine\n"] {
        assert!(text(&file).contains(kept), "{}", text(&file));
    }
    assert_eq!(text(file.with_file_name("agent.toml.bak")), edited);
}

#[test]
fn error_of_a_backend_is_escaped_before_it_is_printed() {
    let backend = Backend::new(|_| Answer::Json(500, json!("\u{9b}31m\u{202e}gone")));
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = format!(
        "[coordinator]\nurl = \"wss://h/\"\n[[backends]]\n{}\n\
         [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n",
        backend.toml()
    );
    home.write(USUAL, &old);
    let ran = set_up(&home, &server.url(), &[]);
    assert_done(&ran);
    // Before the pairing, and with the offer after it.
    assert_eq!(ran.stdout.matches("\\u{9b}31m\\u{202e}gone").count(), 2, "{}", ran.stdout);
    assert!(!(ran.stdout + &ran.stderr).contains(['\u{9b}', '\u{202e}']));
}

#[test]
fn setup_changes_only_what_the_pairing_decides_however_the_file_is_spelled() {
    let server = coordinator(|_| active());
    let url = server.url().replace("http", "ws") + "/provider/connect";
    let head = format!("# paired with:  {}\n# provider_id:  prov_7\n# host token:   host…cdef\n\n", server.url());
    // A server on a default port of this machine would be added if the file did not name it.
    let usual = [("vllm", 8000), ("llamacpp", 8080), ("llamacpp", 9931), ("lmstudio", 1234), ("ollama", 11434)];
    let listed =
        usual.map(|(kind, port)| format!("  {{kind = '{kind}',url=\"http://localhost:{port}\"}}, # one\n")).concat();
    let headed =
        usual.map(|(kind, port)| format!("[[backends]]#one\nkind='{kind}'\nurl = \"http://localhost:{port}\"\n"));
    let tables = "# dotted\ncoordinator . url=\"URL\"#here\n  pricing.default_input_per_1m = 1_0 # in\n\
                  pricing.\"default_output_per_1m\" = 0x2\n\n# each of its own\n[pricing.models.\"m\"]\t# ours\n\
                  output_per_1m=OUTPUT\ninput_per_1m =  INPUT\n[limits]\nmax_concurrent=JOBS\n# the end";
    let braces = "coordinator = {url=\"URL\"} # here\n\
                  pricing = { default_input_per_1m = 1, default_output_per_1m = 2, models = { \n\
                  m = { input_per_1m = INPUT, # in\n output_per_1m = OUTPUT } } }\n\
                  limits = {max_concurrent = JOBS, \"odd\" = [ 1,2 ]}\nunknown = '''\n  text'''\n";
    let files = [format!("backends = [\n{listed}]\n{tables}"), format!("{braces}{}", headed.concat())];
    let filled = |text: &str, [url, input, output, jobs]: [&str; 4]| {
        text.replace("URL", url).replace("INPUT", input).replace("OUTPUT", output).replace("JOBS", jobs)
    };
    let spellings: [fn(String) -> String; 3] =
        [|text| text, |text| text.replace('\n', "\r\n"), |text| format!("\u{feff}{text}")];
    side_by_side(spellings, |spelled| {
        for template in &files {
            let home = Scratch::new();
            let old = spelled(filled(template, ["wss://old/", "1", "0o7", "2"]));
            let file = home.write(USUAL, &old);
            assert_done(&set_up(&home, &server.url(), &[]));
            let body = filled(template, [&url, "300000", "450000", "6"]);
            assert_eq!(text(&file), spelled(format!("{head}{body}")));
            let bak = file.with_file_name("agent.toml.bak");
            assert_eq!(text(&bak), old);

            // A second, identical pairing writes nothing.
            fs::remove_file(&bak).expect("a copy");
            let modified = || fs::metadata(&file).and_then(|file| file.modified()).expect("a time");
            let before = modified();
            assert_done(&set_up(&home, &server.url(), &[]));
            assert_eq!((modified(), bak.exists()), (before, false));
        }
    });
}

#[test]
fn invalid_file_is_named_and_left_unchanged() {
    let server = coordinator(|_| active());
    let home = Scratch::new();
    for broken in ["[coordinator]\nurl = 7\n", "not toml", "\u{0}"] {
        let file = home.write(USUAL, broken);
        let ran = set_up(&home, &server.url(), &[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stdout);
        assert!(ran.stderr.contains("agent.toml:"), "{}", ran.stderr);
        assert_eq!(text(&file), broken);
    }
    assert!(server.seen().is_empty());
    assert_eq!(fs::read_dir(home.join(".config/usepod-agent")).expect("the folder").count(), 1);
}

#[test]
fn symlink_stays_and_an_unwritable_path_is_named_before_the_pairing() {
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = "[coordinator]\nurl = \"wss://h/\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n";
    let real = home.write("dotfiles/agent.toml", old);
    let link = home.join("link.toml");
    std::os::unix::fs::symlink(&real, &link).expect("a link");
    // The shell does not expand `~` after `=`.
    assert_done(&set_up(&home, &server.url(), &["--config=~/link.toml"]));
    assert!(fs::symlink_metadata(&link).expect("a link").is_symlink());
    assert!(text(&real).contains("provider_id:  prov_7"));
    assert_eq!(text(home.join("link.toml.bak")), old);

    let asked = server.seen().len();
    home.write("a-file", "");
    for place in [home.join("a-file/agent.toml"), "/proc/self/agent.toml".into()] {
        let place = place.to_str().expect("UTF-8");
        let ran = set_up(&home, &server.url(), &["--config", place]);
        assert!(matches!(ran.code, Some(1 | 2)), "{place}: {:?}", ran.code);
        assert!(ran.stderr.contains(place), "{place}: {}", ran.stderr);
    }
    assert_eq!(server.seen().len(), asked);
}

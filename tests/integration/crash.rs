//! SIGKILL at any moment: the files stay intact, and the agent keeps its identity.

use std::fs::{self, File, FileTimes};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, unbounded};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use tungstenite::Message;

use crate::support::*;

/// The number of agents; each is killed during its first start and some more.
const AGENTS: usize = 50;
const KILLS_EACH: usize = 4;

/// A coordinator that accepts every agent, gives each connection another provider id, and records how far it came.
struct Enroller {
    address: SocketAddr,
    ended: Receiver<(SocketAddr, Option<Enrolled>)>,
}

/// A connection that got as far as the signature.
struct Enrolled {
    public: String,
    /// The agent sent its enrollment code, so it has no provider id.
    asked: bool,
    given: String,
    /// The agent sent its offer, so it has stored the id.
    offered: bool,
}

impl Enroller {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("a bound address");
        let (sender, ended) = unbounded();
        std::thread::spawn(move || {
            for (n, (stream, peer)) in std::iter::from_fn(|| listener.accept().ok()).enumerate() {
                if sender.send((peer, enroll(stream, format!("prov_{n}")))).is_err() {
                    return;
                }
            }
        });
        Self { address, ended }
    }

    /// The connections of an agent that has ended.
    fn seen(&self) -> Vec<Enrolled> {
        // A connection made after theirs.
        let mark = TcpStream::connect(self.address).and_then(|stream| stream.local_addr()).expect("the enroller");
        let ended = std::iter::from_fn(|| Some(self.ended.recv_timeout(SOON).expect("the enroller goes on")));
        ended.take_while(|(peer, _)| *peer != mark).filter_map(|(_, enrolled)| enrolled).collect()
    }
}

/// Performs the handshake; `None` if the connection ended before the signature.
fn enroll(stream: TcpStream, given: String) -> Option<Enrolled> {
    stream.set_read_timeout(Some(SOON)).expect("a read timeout");
    let mut socket = tungstenite::accept(stream).ok()?;
    let nonce = given.as_bytes();
    socket.send(Message::text(json!({"type": "auth_challenge", "nonce": base64(nonce)}).to_string())).ok()?;
    let auth: Value = serde_json::from_str(socket.read().ok()?.to_text().ok()?).expect("JSON");
    verify_auth(&auth, nonce);
    let accepted = socket.send(Message::text(json!({"type": "auth_ok", "provider_id": given}).to_string())).is_ok();
    let offered = accepted && socket.read().is_ok_and(|message| message.is_text());
    while offered && socket.read().is_ok() {}
    let public = auth["pubkey"].as_str().expect("a public key").to_owned();
    Some(Enrolled { public, asked: auth["enrollment_code"].is_string(), given, offered })
}

/// The public key and the provider id in the identity file, which must be intact; `None` without a file.
fn identity_in(file: &Path, what: &str) -> Option<(String, Option<String>)> {
    let text = fs::read_to_string(file).ok()?;
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let names: Vec<_> = text.lines().map(|line| line.split(": ").next().unwrap_or_default()).collect();
    let (begin, end) = ("-----BEGIN USEPOD AGENT KEY-----", "-----END USEPOD AGENT KEY-----");
    let expected = [begin, "version", "created", "secret", "public", "provider_id", end];
    let with_id = names == expected;
    assert!(with_id || names == [&expected[..5], &[end]].concat(), "{what}: the file's lines are {names:?}");
    assert!(text.ends_with(&format!("{end}\n")), "{what}: the file's end is missing");
    let seed = unbase64(value("secret").expect("a secret"));
    let key = Ed25519KeyPair::from_seed_unchecked(&seed).expect("a seed");
    let public = value("public").expect("a public key").to_owned();
    assert_eq!(public, base64(key.public_key()), "{what}: the halves of the key do not fit");
    Some((public, value("provider_id").map(str::to_owned)))
}

fn leftovers(folder: &Path, what: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).map_or_else(|_| Vec::new(), Iterator::collect);
    let names = entries.into_iter().map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let names: Vec<_> =
        names.filter(|name| !STATE_FILES.contains(&name.as_str()) && name != "identity.key.state.new").collect();
    assert!(names.iter().all(|name| name.starts_with(".identity.key.new-")), "{what}: the folder has {names:?}");
    names
}

/// The identity of an agent, as shown by its starts so far.
#[derive(Default)]
struct Known {
    public: Option<String>,
    id: Option<String>,
}

impl Known {
    /// Compares what a start has shown and stored with what is known, and updates it.
    fn check(&mut self, seen: &[Enrolled], file: &Path, what: &str) {
        for enrolled in seen {
            let public = self.public.get_or_insert_with(|| enrolled.public.clone());
            assert_eq!(*public, enrolled.public, "{what}: another key signed");
        }
        if let Some(first) = seen.first() {
            assert_eq!(first.asked, self.id.is_none(), "{what}: the id before was {:?}", self.id);
        }
        let Some((public, id)) = identity_in(file, what) else {
            assert_eq!(self.public, None, "{what}: the key that was seen is on no disk");
            return;
        };
        assert_eq!(*self.public.get_or_insert_with(|| public.clone()), public, "{what}: another key is in the file");
        match seen.last() {
            Some(last) if last.offered => assert_eq!(id.as_ref(), Some(&last.given), "{what}: the id was accepted"),
            _ => {
                let given = seen.iter().any(|enrolled| Some(&enrolled.given) == id.as_ref());
                assert!(given || id == self.id, "{what}: {id:?} is in the file, it was {:?}", self.id);
            }
        }
        self.id = id;
    }
}

#[test]
fn slow_sigkill_at_200_moments_of_the_start_never_loses_key_or_id() {
    let enroller = Enroller::new();
    let new_setup =
        || Setup::new(&format!("ws://{}/", enroller.address)).coordinator("enrollment_code = \"POD-ENROLL-abc\"");
    // Returns how long it took, and its connections.
    let start_undisturbed = |setup: &Setup| {
        let began = Instant::now();
        let agent = setup.start();
        agent.stderr.wait_line(&["offering"]);
        let took = began.elapsed();
        drop(agent);
        (took, enroller.seen())
    };
    let (mut whole, _) = start_undisturbed(&new_setup());

    let seed = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64 | 1;
    let mut random = xorshift(seed);
    let (mut kills_before, mut kills_after) = (0, 0);
    for n in 0..AGENTS {
        let (setup, mut known) = (new_setup(), Known::default());
        let file = setup.identity();
        let folder = file.parent().expect("a folder");
        for kill in 0..KILLS_EACH {
            let moment = whole.mul_f64(random() as f64 / u64::MAX as f64);
            let what = format!("seed {seed}, agent {n}, kill {kill}, after {moment:?} of {whole:?}");
            let agent = setup.start();
            std::thread::sleep(moment);
            drop(agent);
            let seen = enroller.seen();
            known.check(&seen, &file, &what);
            leftovers(folder, &what);
            *if seen.is_empty() { &mut kills_before } else { &mut kills_after } += 1;
        }

        // A temporary file, in case no kill has left one.
        let what = format!("seed {seed}, agent {n}, at the end");
        setup.scratch.write(".usepod-agent/.identity.key.new-0", "-----BEGIN USEPOD");
        let two_minutes_ago = FileTimes::new().set_modified(SystemTime::now() - secs(120));
        for name in leftovers(folder, &what) {
            let file = File::options().write(true).open(folder.join(name)).expect("a leftover");
            file.set_times(two_minutes_ago).expect("its time set");
        }
        // The next kills are spread over the time that a start takes now.
        let (took, seen) = start_undisturbed(&setup);
        whole = took;
        known.check(&seen, &file, &what);
        assert_eq!(leftovers(folder, &what), [""; 0], "{what}");
    }
    assert!(
        kills_before > 10 && kills_after > 10,
        "seed {seed}: {kills_before} kills before the key was used, {kills_after} after"
    );
}

//! Questions to a small server of our own, which answers as it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fulgur_datasets::media::{Picture, Sound};
use serde_json::Value;

use super::super::config::Http;
use super::super::stage::{AudioCaptioner, Clip, FrameCaptioner, Merger, Modality, Rewriter, StageError};
use super::{Counts, Remote, Server, Task};
use crate::captions::Record;

const KEY: &str = "sk-do-not-tell-0123456789";

/// What the server does with one request.
#[derive(Clone, Debug)]
enum Reply {
    /// Answers with status, more header lines, and a body.
    Say(u16, &'static str, String),
    /// Answers after a while.
    Late(Duration, Box<Reply>),
    /// Closes the connection.
    Hang,
}

fn good(text: &str) -> Reply {
    let body = serde_json::json!({
        "choices": [{ "message": { "role": "assistant", "content": text } }],
        "usage": { "total_tokens": 40 },
    });
    Reply::Say(200, "", body.to_string())
}

fn status(status: u16) -> Reply {
    Reply::Say(
        status,
        "",
        format!("{{\"error\":{{\"message\":\"no {status}, {KEY} is wrong\"}}}}"),
    )
}

/// A request as it came: head and body.
type Seen = (String, Value);

/// A server on a free port of this machine, until it is dropped.
struct Local {
    base: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    most_at_once: Arc<AtomicU32>,
    closed: Arc<AtomicBool>,
}

impl Local {
    /// Gives these replies one after the other, and then good ones.
    fn start(replies: Vec<Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let local = Self {
            base: format!("http://{address}"),
            seen: Arc::default(),
            most_at_once: Arc::default(),
            closed: Arc::default(),
        };
        let (seen, most, closed) = (
            Arc::clone(&local.seen),
            Arc::clone(&local.most_at_once),
            Arc::clone(&local.closed),
        );
        let replies = Arc::new(Mutex::new(replies.into_iter()));
        let inside = Arc::new(AtomicU32::new(0));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if closed.load(Ordering::SeqCst) {
                    return;
                }
                let (seen, most, inside) = (Arc::clone(&seen), Arc::clone(&most), Arc::clone(&inside));
                let replies = Arc::clone(&replies);
                std::thread::spawn(move || {
                    let stream = stream.unwrap();
                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let reply = read(&stream).map(|request| {
                        let mut seen = seen.lock().unwrap();
                        seen.push(request);
                        let number = seen.len();
                        drop(seen);
                        let told = replies.lock().unwrap().next();
                        told.unwrap_or_else(|| good(&format!("Answer {number} of the server.")))
                    });
                    if let Some(reply) = reply {
                        answer(stream, reply, &inside);
                    }
                });
            }
        });
        local
    }

    fn http(&self) -> Http {
        Http {
            base: self.base.clone(),
            model: "tiny".to_owned(),
            timeout_s: 5.0,
            backoff_s: 0.01,
            ..Http::default()
        }
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the listener, so that its thread ends.
        drop(TcpStream::connect(self.base.trim_start_matches("http://")));
    }
}

fn read(stream: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, serde_json::from_slice(&body).unwrap()))
}

fn answer(mut stream: TcpStream, reply: Reply, inside: &AtomicU32) {
    match reply {
        Reply::Late(pause, reply) => {
            std::thread::sleep(pause);
            answer(stream, *reply, inside);
        }
        Reply::Hang => {
            inside.fetch_sub(1, Ordering::SeqCst);
        }
        Reply::Say(status, more, body) => {
            inside.fetch_sub(1, Ordering::SeqCst);
            let head = format!(
                "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n{more}\r\n",
                body.len()
            );
            // Whoever asked may have given up.
            stream
                .write_all(head.as_bytes())
                .and_then(|()| stream.write_all(body.as_bytes()))
                .ok();
        }
    }
}

fn server(http: &Http, cache: Option<&Path>, minute: Duration) -> Arc<Server> {
    let key = Some(KEY.to_owned());
    Arc::new(Server::with_key(http, key, cache, false, Arc::default(), minute).unwrap())
}

fn plain(http: &Http) -> Arc<Server> {
    server(http, None, Duration::from_secs(60))
}

fn merge(server: &Arc<Server>, video: &str) -> Result<String, StageError> {
    let record = Record::default();
    let clip = Clip {
        id: "a",
        record: &record,
    };
    Remote::new(Arc::clone(server), "tiny", Task::Merge).merge(video, "a dog barks", clip)
}

#[test]
fn questions_have_the_form_of_the_protocol() {
    let local = Local::start(vec![good("```\n\"A dog\n barks.\"\n```")]);
    let server = plain(&local.http());
    assert_eq!(merge(&server, "a dog runs").unwrap(), "A dog barks.");
    let seen = local.seen.lock().unwrap();
    let (head, body) = &seen[0];
    assert!(
        head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(
        head.to_lowercase()
            .contains(&format!("authorization: bearer {KEY}\r\n")),
        "{head}"
    );
    assert!(
        head.to_lowercase().contains("content-type: application/json\r\n"),
        "{head}"
    );
    assert_eq!(
        (&body["model"], &body["temperature"]),
        (&"tiny".into(), &0.0.into())
    );
    assert_eq!((&body["max_tokens"], &body["seed"]), (&128.into(), &0.into()));
    let message = &body["messages"][0];
    assert_eq!(message["role"], "user");
    let text = message["content"].as_str().unwrap();
    assert!(text.contains("Visual: a dog runs Sound: a dog barks."), "{text}");
    let counts = server.counts();
    assert_eq!(
        (counts.requests, counts.retries, counts.cached, counts.tokens),
        (1, 0, 0, 40)
    );
}

#[test]
fn without_a_key_none_is_sent() {
    let local = Local::start(Vec::new());
    let http = Http {
        key_env: "FULGUR_TEST_NO_SUCH_KEY".to_owned(),
        base: format!("{}/v1/", local.base),
        ..local.http()
    };
    let server = Arc::new(Server::open(&http, None, false, Arc::default()).unwrap());
    merge(&server, "a dog runs").unwrap();
    let seen = local.seen.lock().unwrap();
    assert!(
        seen[0].0.starts_with("POST /v1/chat/completions ")
            && !seen[0].0.to_lowercase().contains("authorization")
    );
}

#[test]
fn pictures_and_sounds_travel_as_data() {
    let local = Local::start(Vec::new());
    let server = plain(&local.http());
    let record = Record::default();
    let clip = Clip {
        id: "a",
        record: &record,
    };
    let picture = Picture::new(vec![90; 16 * 16 * 3], 16, 16, 3).unwrap();
    let frames = Remote::new(Arc::clone(&server), "eyes", Task::Frames);
    FrameCaptioner::caption(&frames, &[picture.clone(), picture], clip).unwrap();
    let sound = Sound::new(vec![0.1; 160], 1, 16_000).unwrap();
    let audio = Remote::new(Arc::clone(&server), "ears", Task::Audio);
    AudioCaptioner::caption(&audio, Some(&sound), clip).unwrap();
    let rewrite = Remote::new(Arc::clone(&server), "words", Task::Rewrite);
    rewrite.rewrite("a dog", Modality::Visual, clip).unwrap();
    let seen = local.seen.lock().unwrap();
    let parts = |i: usize| seen[i].1["messages"][0]["content"].as_array().unwrap().clone();
    let pictures = parts(0);
    assert_eq!((pictures.len(), &pictures[0]["type"]), (3, &"text".into()));
    let url = pictures[2]["image_url"]["url"].as_str().unwrap();
    assert!(url.starts_with("data:image/jpeg;base64,/9j/"), "{url}");
    let sounds = parts(1);
    assert_eq!(sounds[1]["input_audio"]["format"], "wav");
    assert!(
        sounds[1]["input_audio"]["data"]
            .as_str()
            .unwrap()
            .starts_with("UklGR")
    );
    assert_eq!(
        (&seen[0].1["model"], &seen[1].1["model"]),
        (&"eyes".into(), &"ears".into())
    );
    assert!(
        seen[2].1["messages"][0]["content"]
            .as_str()
            .unwrap()
            .contains("visual content")
    );
    assert!(FrameCaptioner::caption(&frames, &[], clip).is_err());
    assert!(AudioCaptioner::caption(&audio, None, clip).is_err());
}

#[test]
fn what_may_pass_is_tried_again() {
    for reply in [
        status(408),
        status(409),
        status(429),
        status(500),
        status(503),
        Reply::Hang,
    ] {
        let local = Local::start(vec![reply.clone(), reply.clone(), good("Done.")]);
        let server = plain(&local.http());
        assert_eq!(merge(&server, "x").as_deref(), Ok("Done."), "{reply:?}");
        assert_eq!((server.counts().requests, server.counts().retries), (3, 2));
    }
}

#[test]
fn tries_end_and_the_last_reason_is_told() {
    let local = Local::start(vec![status(500); 9]);
    let http = Http {
        tries: 3,
        ..local.http()
    };
    let error = merge(&plain(&http), "x").unwrap_err().to_string();
    assert_eq!(error, "status 500: no 500, *** is wrong, after 3 tries");
    assert_eq!(local.requests(), 3);
}

#[test]
fn what_will_not_pass_is_not_tried_again_and_keys_stay_secret() {
    let not_json = Reply::Say(200, "", "<html>busy</html>".to_owned());
    let no_choice = Reply::Say(200, "", "{\"choices\":[]}".to_owned());
    let moved = Reply::Say(302, "Location: http://127.0.0.1:9/x\r\n", String::new());
    for (reply, words) in [
        (status(401), "status 401: no 401, *** is wrong"),
        (status(400), "status 400: no 400, *** is wrong"),
        (status(404), "status 404: no 404, *** is wrong"),
        (not_json, "no JSON in the answer: <html>busy</html>"),
        (no_choice, "no choices in the answer"),
        (good("  "), "an empty answer"),
        (moved, "status 302: "),
    ] {
        let local = Local::start(vec![reply]);
        let server = plain(&local.http());
        let error = merge(&server, "x").unwrap_err();
        assert_eq!(error, StageError::Clip(words.to_owned()));
        assert_eq!(local.requests(), 1, "{words}");
        assert!(!format!("{server:?}{error}").contains(KEY));
        // The next clip is not harmed.
        assert!(merge(&server, "y").is_ok());
    }
}

#[test]
fn a_server_that_refuses_the_key_again_and_again_is_asked_no_more() {
    let local = Local::start(vec![
        status(401),
        status(403),
        good("Once."),
        status(401),
        status(401),
        status(403),
    ]);
    let server = plain(&local.http());
    let clip = |error: StageError| assert!(matches!(error, StageError::Clip(_)), "{error:?}");
    for video in ["a", "b"] {
        clip(merge(&server, video).unwrap_err());
    }
    // An answer in between says that the key is good.
    assert_eq!(merge(&server, "c").as_deref(), Ok("Once."));
    for video in ["d", "e", "f"] {
        clip(merge(&server, video).unwrap_err());
    }
    let StageError::Run(line) = merge(&server, "g").unwrap_err() else {
        panic!("expected the end of the run")
    };
    assert!(
        line.contains("found 3 refusals (401 or 403) in a row, expected a key"),
        "{line}"
    );
    assert!(!line.contains(KEY) && !line.contains('\n'));
    assert_eq!(local.requests(), 6);
}

#[test]
fn the_pause_that_a_server_asks_for_is_kept() {
    let busy = Reply::Say(429, "Retry-After: 0.4\r\n", "{}".to_owned());
    let local = Local::start(vec![busy]);
    let server = plain(&local.http());
    let began = Instant::now();
    merge(&server, "x").unwrap();
    assert!(
        began.elapsed() >= Duration::from_millis(400),
        "{:?}",
        began.elapsed()
    );
    let endless = Reply::Say(503, "Retry-After: 100000\r\n", "{}".to_owned());
    let local = Local::start(vec![endless]);
    let error = merge(&plain(&local.http()), "x").unwrap_err().to_string();
    assert!(error.contains("asks for a pause of 100000 s"), "{error}");
}

#[test]
fn answers_that_take_too_long_are_given_up() {
    let late = Reply::Late(Duration::from_millis(800), Box::new(good("Too late.")));
    let local = Local::start(vec![late, good("In time.")]);
    let http = Http {
        timeout_s: 0.25,
        ..local.http()
    };
    let server = plain(&http);
    assert_eq!(merge(&server, "x").as_deref(), Ok("In time."));
    assert_eq!(server.counts().retries, 1);
}

#[test]
fn nobody_there_is_a_reason_too() {
    let http = Http {
        base: "http://127.0.0.1:9".to_owned(),
        tries: 2,
        backoff_s: 0.01,
        ..Http::default()
    };
    let error = merge(&plain(&http), "x").unwrap_err().to_string();
    assert!(
        error.starts_with("http://127.0.0.1:9/v1/chat/completions: ") && error.ends_with(", after 2 tries"),
        "{error}"
    );
}

#[test]
fn answers_are_kept_on_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::start(vec![good("Kept.")]);
    let minute = Duration::from_secs(60);
    let first = server(&local.http(), Some(folder.path()), minute);
    assert_eq!(merge(&first, "x").as_deref(), Ok("Kept."));
    let second = server(&local.http(), Some(folder.path()), minute);
    assert_eq!(merge(&second, "x").as_deref(), Ok("Kept."));
    assert_eq!(
        (local.requests(), second.counts().cached, second.counts().requests),
        (1, 1, 0)
    );
    assert_eq!(
        merge(&second, "another").as_deref(),
        Ok("Answer 2 of the server.")
    );
    // Errors are not kept.
    let local = Local::start(vec![status(401)]);
    let third = server(&local.http(), Some(folder.path()), minute);
    assert!(merge(&third, "z").is_err());
    assert!(merge(&third, "z").is_ok());
}

#[test]
fn requests_go_out_a_few_at_a_time_and_a_few_a_minute() {
    let slow = Reply::Late(Duration::from_millis(40), Box::new(good("Slow.")));
    let local = Local::start(vec![slow; 12]);
    let http = Http {
        concurrency: 3,
        ..local.http()
    };
    let many = plain(&http);
    std::thread::scope(|scope| {
        for i in 0..12 {
            let many = &many;
            scope.spawn(move || merge(many, &format!("{i}")).unwrap());
        }
    });
    assert_eq!(local.most_at_once.load(Ordering::SeqCst), 3);
    let http = Http {
        requests_per_minute: 2,
        ..local.http()
    };
    let few = server(&http, None, Duration::from_millis(300));
    let began = Instant::now();
    for i in 0..5 {
        merge(&few, &format!("few {i}")).unwrap();
    }
    // Two at once, two after a "minute", the last after another.
    assert!(
        began.elapsed() >= Duration::from_millis(560),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_dry_run_asks_nobody_and_counts() {
    let local = Local::start(Vec::new());
    let dry = Arc::new(
        Server::with_key(
            &local.http(),
            None,
            None,
            true,
            Arc::default(),
            Duration::from_secs(60),
        )
        .unwrap(),
    );
    merge(&dry, "a dog runs").unwrap();
    merge(&dry, "a cat runs").unwrap();
    let Counts { requests, tokens, .. } = dry.counts();
    assert_eq!((local.requests(), requests), (0, 2));
    assert!((400..800).contains(&tokens), "{tokens}");
}

#[test]
fn waiting_ends_with_the_run() {
    let busy = Reply::Say(429, "Retry-After: 600\r\n", "{}".to_owned());
    let local = Local::start(vec![busy]);
    let stop: Arc<AtomicBool> = Arc::default();
    let server = Arc::new(
        Server::with_key(
            &local.http(),
            None,
            None,
            false,
            Arc::clone(&stop),
            Duration::from_secs(60),
        )
        .unwrap(),
    );
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| merge(&server, "x"));
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::SeqCst);
        assert_eq!(asking.join().unwrap(), Err(StageError::Stopped));
    });
}

#[test]
fn addresses_and_keys_that_are_none_are_refused() {
    for base in [
        "",
        "example.org",
        "ftp://example.org",
        "http://",
        "https://me:secret@example.org",
        "http://a b",
    ] {
        let http = Http {
            base: base.to_owned(),
            ..Http::default()
        };
        let error = Server::open(&http, None, false, Arc::default())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("http.base: found "), "{error}");
    }
    let key = Some("sk-\n1".to_owned());
    let error = Server::with_key(
        &Http::default(),
        key,
        None,
        false,
        Arc::default(),
        Duration::from_secs(60),
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("http.key_env") && !error.contains("sk-"),
        "{error}"
    );
}

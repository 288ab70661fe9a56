//! Promises that hold for every command.

use std::fs::File;
use std::io;

use crate::support::{Ran, fulgur, run};

#[test]
fn without_a_command_or_with_a_wrong_one_there_is_one_line() {
    assert!(run::<&str>([]).error().contains("requires a subcommand"));
    assert!(run(["fly"]).error().contains("unrecognized subcommand 'fly'"));
    assert!(
        run(["doctor", "--json", "--wings"])
            .error()
            .contains("unexpected argument '--wings'")
    );
    assert!(run(["doctor", "extra"]).error().contains("'extra'"));
    for line in [
        run(["doctor", "--device", "tpu"]),
        run(["forward", "--device", "cuda:x"]),
    ] {
        assert!(
            line.error().contains("expected auto, cpu, cuda or cuda:N"),
            "{}",
            line.stderr
        );
    }
}

#[test]
fn a_missing_argument_is_named() {
    let ran = run(["forward", "--op", "lightnet-noncausal"]);
    let line = ran.error();
    assert!(
        line.contains("--inputs") && line.contains("--out") && line.ends_with("see --help"),
        "{line}"
    );
}

#[test]
fn help_and_version_go_to_standard_output() {
    for arguments in [
        &["--help"][..],
        &["help", "doctor"],
        &["doctor", "-h"],
        &["--version"],
    ] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(ran.stdout.contains("fulgur"), "{}", ran.stdout);
    }
    assert!(run(["--version"]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_closed_pipe_is_no_error() {
    for arguments in [&["commands"][..], &["doctor"], &["doctor", "--json"]] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let ran = Ran::of(fulgur().args(arguments).stdout(writer).output().unwrap());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_standard_output_is_an_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let ran = Ran::of(fulgur().args(["doctor", "--json"]).stdout(full).output().unwrap());
    assert!(ran.error().starts_with("standard output: "), "{}", ran.stderr);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_gpu_that_cannot_be_used_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let out = out.to_str().unwrap();
    let ran = run([
        "forward",
        "--op",
        "lightnet-noncausal",
        "--inputs",
        "in",
        "--out",
        out,
        "--device",
        "cuda",
    ]);
    assert!(
        ran.error()
            .starts_with("device cuda:0: this program was built without cuda"),
        "{}",
        ran.stderr
    );
}

#[test]
fn doctor_reports_every_check() {
    let ran = run(["doctor", "--json"]);
    assert_eq!(ran.stderr, "");
    let report = ran.json();
    let checks = report["checks"].as_array().unwrap();
    let mut required_fails = false;
    for check in checks {
        assert!(
            check["name"].is_string() && check["detail"].is_string(),
            "{check}"
        );
        let ok = check["ok"].as_bool().unwrap();
        assert_eq!(check["advice"].is_string(), !ok, "{check}");
        required_fails |= !ok && check["required"].as_bool().unwrap();
    }
    assert_eq!(ran.code, i32::from(required_fails));
    let text = run(["doctor"]).stdout;
    for name in [
        "cpu", "cores", "memory", "gpu", "ranks", "mpi", "nccl", "ffmpeg", "apt-get", "dpkg-deb", "pip",
        "npm", "data", "disk",
    ] {
        assert!(
            checks.iter().any(|check| check["name"] == name),
            "{name} is missing: {report}"
        );
        assert!(text.contains(name), "{text}");
    }
}

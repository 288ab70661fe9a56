//! Training with several ranks: threads, processes, what ends them, and what they answer to bad input.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Ran, fulgur};

/// A recipe of a small language model, which writes its run into `folder`.
fn recipe(folder: &Path) -> PathBuf {
    let text: String = (0..4000)
        .map(|i| ["one ", "two ", "three ", "four "][i * i % 7 % 4])
        .collect();
    fs::write(folder.join("text.txt"), text).unwrap();
    let path = folder.join("tiny.toml");
    let body = format!(
        "task = 'lm'\nseed = 2\nrun_dir = '{run}'\n[train]\nmax_steps = 8\nlog_every = 1\nema = 0.0\n\
         [lm]\ntokens = '{tokens}'\nheld_out = 0.2\nbatch = 4\ncontext = 32\nvalidation = 4\n\
         [lm.model]\nlayers = 2\nwidth = 32\nhidden = 48\nheads = 2\narchitecture = 'hgrn2'\n",
        run = folder.join("run").display(),
        tokens = folder.join("text.txt").display()
    );
    fs::write(&path, body).unwrap();
    path
}

fn train(recipe: &Path, more: &[&str]) -> Command {
    let mut command = fulgur();
    command
        .args(["train", "--device", "cpu", "--json", "-q"])
        .arg(recipe)
        .args(more);
    command
}

fn losses(folder: &Path, run: &str) -> Vec<f64> {
    let lines = fs::read_to_string(folder.join(run).join("metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64();
    lines.lines().filter_map(loss).collect()
}

fn of(folder: &Path, run: &str) -> String {
    format!("run_dir={}", folder.join(run).display())
}

#[test]
fn threads_and_processes_make_the_run_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let recipe = recipe(root);
    let one = Ran::of(train(&recipe, &[]).output().unwrap());
    assert_eq!((one.code, one.stderr.as_str()), (0, ""));
    let expected = losses(root, "run");
    assert_eq!(expected.len(), 8);
    let same = |run: &str, ran: &Ran| {
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{run}");
        let answer = ran.json();
        assert_eq!(answer["step"], 8);
        for (found, expected) in losses(root, run).iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{run}: {found} {expected}");
        }
        assert!(root.join(run).join("model/model.safetensors").is_file());
    };
    let sets = ["--set", "distributed.world=4", "--set", "distributed.sequence=2"];
    let run = of(root, "threads");
    let network = ["--set", &run, "--simulate-network", "1ms,1Gbit/s"];
    let ran = Ran::of(train(&recipe, &[&sets[..], &network].concat()).output().unwrap());
    same("threads", &ran);
    let run = of(root, "processes");
    let mut command = fulgur();
    command
        .args([
            "launch", "--procs", "2", "--json", "-q", "--", "train", "--device", "cpu", "-q",
        ])
        .arg(&recipe)
        .args([
            "--set",
            &run,
            "--set",
            "distributed.sequence=2",
            "--set",
            "distributed.method=lasp1",
        ]);
    same("processes", &Ran::of(command.output().unwrap()));
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

fn rank(mut command: Command, rank: usize, world: usize, port: &str) -> Child {
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("MASTER_PORT", port)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn ended(mut child: Child) -> (i32, String, String) {
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (child.wait().unwrap().code().unwrap_or(-1), out, err)
}

/// A process that is killed ends the job on every other rank with one line, and the run goes on without it.
#[test]
fn a_killed_rank_ends_the_job_and_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let recipe = recipe(root);
    let port = free_port();
    let sets = [
        "--set",
        "train.max_steps=100000",
        "--set",
        "train.checkpoint_seconds=0.2",
        "--set",
        "lm.batch=6",
    ];
    let start = |number| rank(train(&recipe, &sets), number, 3, &port);
    let mut ranks: Vec<Child> = (0..3).map(start).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !root.join("run/checkpoints").is_dir()
        || fs::read_dir(root.join("run/checkpoints")).unwrap().count() == 0
    {
        assert!(Instant::now() < deadline, "no checkpoint in a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut victim = ranks.remove(1);
    victim.kill().unwrap();
    victim.wait().unwrap();
    let killed = Instant::now();
    for child in ranks {
        let (code, out, err) = ended(child);
        assert_eq!((code, out.as_str()), (2, ""));
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(
            err.starts_with("error: ") && err.contains("rank 1 has ended: its process has ended"),
            "{err}"
        );
    }
    assert!(killed.elapsed() < Duration::from_secs(30));
    // Two ranks as threads go on from the last checkpoint.
    let state = fs::read_dir(root.join("run/checkpoints")).unwrap().count();
    assert!(state > 0);
    let more = ["--resume", "--pause-after", "1", "--set", "distributed.world=2"];
    let ran = Ran::of(train(&recipe, &[&sets[..], &more].concat()).output().unwrap());
    assert_eq!((ran.code, ran.stderr.as_str()), (1, ""));
    assert!(ran.json()["step"].as_u64().unwrap() > 0);
}

#[test]
fn jobs_that_make_no_sense_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let recipe = recipe(root);
    let refused = |ran: Ran, words: &str| {
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{words}");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
        assert!(!root.join("run/checkpoints").exists(), "{words}");
    };
    let with = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        Ran::of(train(&recipe, &sets).output().unwrap())
    };
    for (sets, words) in [
        (
            &["distributed.world=3"][..],
            "batch is 4, expected a multiple of 3, the groups of ranks",
        ),
        (
            &["distributed.world=4", "distributed.sequence=3"],
            "distributed.sequence: found 3",
        ),
        (&["distributed.timeout_s=nan"], "distributed.timeout_s: found NaN"),
        (&["distributed.method=lasp3"], "unknown variant `lasp3`"),
        (&["distributed.outer.tau=3"], "unknown field `tau`"),
        (
            &["distributed.outer.clip=nan"],
            "distributed.outer.clip: found NaN",
        ),
        (
            &[
                "distributed.world=2",
                "distributed.outer.inner_steps=3",
                "train.compact=true",
            ],
            "train.compact",
        ),
    ] {
        refused(with(sets), words);
    }
    let ran = train(&recipe, &["--simulate-network", "fast"]).output().unwrap();
    refused(Ran::of(ran), "expected LATENCY,BANDWIDTH as in 50us,10Gbit/s");
    // A rank that nobody else joins, a port that is taken, and variables that make no sense.
    let short = ["--set", "distributed.timeout_s=0.3"];
    let (code, out, err) = ended(rank(train(&recipe, &short), 0, 2, &free_port()));
    assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{err}");
    assert!(err.contains("waited 300ms for rank 1"), "{err}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, _, err) = ended(rank(train(&recipe, &short), 0, 2, &port));
    assert!(
        code == 2 && err.contains(&format!("cannot listen at 127.0.0.1:{port}")),
        "{err}"
    );
    let (code, _, err) = ended(rank(train(&recipe, &short), 5, 2, &port));
    assert!(
        code == 2 && err.contains("RANK is 5, expected less than 2"),
        "{err}"
    );
    // Ranks of different recipes.
    let port = free_port();
    let pair = [0, 1].map(|number| {
        let lr = format!("optimiser.lr=0.00{}", number + 1);
        rank(train(&recipe, &["--set", &lr]), number, 2, &port)
    });
    for (number, child) in pair.into_iter().enumerate() {
        let (code, _, err) = ended(child);
        assert!(
            code == 2 && err.contains("recipe: rank 0 called "),
            "rank {number}: {err}"
        );
    }
    let launch = |arguments: &[&str]| Ran::of(fulgur().arg("launch").args(arguments).output().unwrap());
    refused(
        launch(&["--procs", "0", "--", "doctor"]),
        "--procs is 0, expected 1 to 1024",
    );
    refused(launch(&["--procs", "2"]), "required arguments");
    let path = recipe.to_str().unwrap();
    let bad = [
        "--procs",
        "2",
        "--",
        "train",
        path,
        "--device",
        "cpu",
        "-q",
        "--set",
        "lm.batch=0",
    ];
    refused(launch(&bad), "batch 0, context 32: expected both above 0");
}

/// The table of more ranks is what the formulas of the page say.
#[test]
fn steps_on_more_ranks_are_foretold() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let estimate = |more: &[&str]| {
        let mut command = fulgur();
        command.args(["estimate", "--json"]).arg(&recipe).args(more);
        Ran::of(command.output().unwrap())
    };
    let ran = estimate(&[
        "--world",
        "8,1024",
        "--network",
        "5us,10Gbit/s",
        "--step-ms",
        "20",
    ]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let answer = ran.json();
    let bytes = 4.0 * answer["parameters"].as_f64().unwrap();
    for (row, ranks) in answer["forecasts"].as_array().unwrap().iter().zip([8.0, 1024.0]) {
        let expected = 2.0 * (ranks - 1.0) * (5e-6 + bytes / ranks / 1.25e9);
        let found = row["reduce_s"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        assert!((row["synchronous_s"].as_f64().unwrap() - 0.02 - expected).abs() < 1e-6);
        // Two layers of B H D E values of four bytes, there and back.
        assert_eq!(row["state_bytes"], 2 * 2 * 4 * 2 * 16 * 16 * 4);
    }
    for (more, words) in [
        (
            &["--world", "0", "--network", "5us,1Gbit/s"][..],
            "--world: found 0",
        ),
        (&["--world", "8"], "--network"),
        (
            &["--world", "8", "--network", "5us,1Gbit/s", "--step-ms", "nan"],
            "--step-ms: found NaN",
        ),
    ] {
        let ran = estimate(more);
        assert!(ran.code == 2 && ran.stderr.contains(words), "{}", ran.stderr);
    }
}

/// The whole training by processes of MPI: the run of one, with rows, sequences, layers and parameters over ranks; a run goes on
/// with other ranks.
#[cfg(feature = "mpi")]
#[test]
fn processes_of_mpi_make_the_run_of_one() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        eprintln!("skipped: there is no mpirun");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let recipe = recipe(root);
    let tnl = "lm.model.architecture='tnl'";
    let one = Ran::of(train(&recipe, &["--set", tnl]).output().unwrap());
    assert_eq!((one.code, one.stderr.as_str()), (0, ""));
    let expected = losses(root, "run");
    assert_eq!(expected.len(), 8);
    let program = fulgur();
    let by_mpi = |ranks: &str, run: &str, more: &[&str]| {
        let mut command = Command::new("mpirun");
        command
            .args(["--oversubscribe", "--allow-run-as-root", "-n", ranks])
            .arg(program.get_program())
            .args(["train", "--device", "cpu", "--json", "-q"])
            .arg(&recipe)
            .args(["--set", tnl, "--set", &of(root, run)])
            .args(more)
            .env("RAYON_NUM_THREADS", "1");
        Ran::of(command.output().unwrap())
    };
    for (ranks, run, settings) in [
        ("2", "rows", &[][..]),
        ("2", "tensor", &["--set", "distributed.tensor=2"]),
        (
            "4",
            "mixed",
            &[
                "--set",
                "distributed.sequence=2",
                "--set",
                "distributed.shard='parameters'",
            ],
        ),
        (
            "4",
            "ring",
            &[
                "--set",
                "distributed.sequence=4",
                "--set",
                "distributed.method='lasp1'",
            ],
        ),
    ] {
        let ran = by_mpi(ranks, run, settings);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{run}");
        assert_eq!(ran.json()["step"], 8, "{run}");
        let found = losses(root, run);
        assert_eq!(found.len(), 8, "{run}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{run}: {found} {expected}");
        }
        assert!(root.join(run).join("model/model.safetensors").exists(), "{run}");
    }
    // Four more steps by two ranks after those of four.
    let more = ["--resume", "--set", "train.max_steps=12"];
    let ran = by_mpi("2", "mixed", &more);
    assert_eq!((ran.code, losses(root, "mixed").len()), (0, 12), "{}", ran.stderr);
    // What does not fit is one line of each rank, and nothing is trained.
    let ran = by_mpi("2", "refused", &["--set", "distributed.tensor=3"]);
    assert_ne!(ran.code, 0);
    assert!(
        ran.stderr
            .contains("distributed.tensor: found 3, expected a number that divides 2"),
        "{}",
        ran.stderr
    );
    assert!(!root.join("refused/checkpoints").exists());
}

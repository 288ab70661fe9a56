//! Real signals to a real process: Ctrl-C keeps what is finished, and a killed run goes on as if nothing had happened.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Ran, fulgur, names, run};
use crate::training;

/// A test that waits longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The program at work.
pub(crate) struct Running {
    pub(crate) child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Running {
    pub(crate) fn start<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = fulgur();
        command.args(arguments);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            stderr,
            said: String::new(),
        }
    }

    /// Waits for a line on standard error that `is_it` accepts.
    #[track_caller]
    fn wait_for_line(&mut self, is_it: impl Fn(&str) -> bool) {
        loop {
            let mut line = String::new();
            assert!(
                self.stderr.read_line(&mut line).unwrap() > 0,
                "ended: {}",
                self.said
            );
            self.said.push_str(&line);
            if is_it(&line) {
                return;
            }
        }
    }

    /// Waits until `ready` holds.
    #[track_caller]
    pub(crate) fn wait_until(&mut self, ready: impl Fn() -> bool) {
        let began = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.stderr.read_to_string(&mut self.said).unwrap();
                panic!("ended too early: {status} {}", self.said);
            }
            assert!(began.elapsed() < PATIENCE, "nothing happened for {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends `INT` or `KILL`.
    pub(crate) fn send(&self, signal: &str) {
        let mut kill = Command::new("sh");
        kill.args(["-c", "kill -$1 $2", "sh", signal, &self.child.id().to_string()]);
        assert!(kill.status().expect("sh starts").success(), "kill -{signal}");
    }

    /// Waits for the end; the code is none where a signal ended it.
    pub(crate) fn finish(mut self) -> (Option<i32>, Ran) {
        self.stderr.read_to_string(&mut self.said).unwrap();
        let output = self.child.wait_with_output().unwrap();
        let code = output.status.code();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let ran = Ran {
            code: code.unwrap_or(-1),
            stdout,
            stderr: self.said,
        };
        (code, ran)
    }
}

/// Lines that the run in `folder` has logged.
pub(crate) fn logged(folder: &Path) -> usize {
    fs::read_to_string(folder.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Everything in `folder` and below it that looks unfinished.
pub(crate) fn unfinished(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for name in names(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            found.extend(unfinished(&path));
        }
        if [".tmp", ".part", ".old"].iter().any(|end| name.ends_with(end)) {
            found.push(name);
        }
    }
    found
}

pub(crate) fn train(recipe: &Path, more: &[&str]) -> Ran {
    let recipe = recipe.to_str().unwrap();
    run(["train", recipe, "--json", "--device", "cpu"].iter().chain(more))
}

#[test]
fn an_interrupted_training_keeps_its_work_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = training::recipe(folder.path(), 1_000_000);
    let run_dir = folder.path().join("run");
    let mut running = Running::start(["train", recipe.to_str().unwrap(), "--json", "--device", "cpu"]);
    running.wait_until(|| logged(&run_dir) >= 2);
    running.send("INT");
    let (_, ran) = running.finish();
    assert_eq!(ran.code, 1, "done in part: {}", ran.stderr);
    assert!(ran.stderr.contains("press Ctrl-C again"), "{}", ran.stderr);
    let report = ran.json();
    let step = report["step"].as_u64().unwrap();
    assert!(step >= 10 && report["finished"] == false, "{report}");
    let kept = names(&run_dir.join("checkpoints"));
    assert!(kept.contains(&format!("step-{step:010}")), "{kept:?}");
    assert!(!run_dir.join("model").exists());
    assert_eq!(unfinished(folder.path()), [""; 0]);

    let all = format!("train.max_steps={}", step + 3);
    let ran = train(&recipe, &["--resume", "--set", &all]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(
        (&report["step"], &report["finished"]),
        (&(step + 3).into(), &true.into())
    );
    assert!(run_dir.join("model/model.safetensors").exists());
}

/// Ends the process in the middle of whatever it does, several times: checkpoints are written all the time.
#[test]
fn a_killed_training_goes_on_to_the_same_model() {
    const STEPS: u64 = 300;
    let (straight, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ran = train(&training::recipe(straight.path(), STEPS), &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let recipe = training::recipe(killed.path(), STEPS);
    let run_dir = killed.path().join("run");
    for (kills, lines) in [3, 17, 31, 45].into_iter().enumerate() {
        let path = recipe.to_str().unwrap();
        let mut arguments = vec![
            "train",
            path,
            "--device",
            "cpu",
            "--set",
            "train.checkpoint_seconds=1e-6",
        ];
        if kills > 0 {
            arguments.push("--resume");
        }
        let mut running = Running::start(&arguments);
        running.wait_until(|| logged(&run_dir) >= lines);
        running.send("KILL");
        assert_eq!(running.finish().0, None, "ended by the signal");
    }
    let ran = train(&recipe, &["--resume"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.json()["step"], STEPS);
    let model = |folder: &Path| fs::read(folder.join("run/model/model.safetensors")).unwrap();
    assert!(model(straight.path()) == model(killed.path()), "another model");
    assert_eq!(logged(&run_dir), logged(&straight.path().join("run")));
    assert_eq!(unfinished(killed.path()), [""; 0]);
}

#[test]
fn a_second_interrupt_leaves_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = training::recipe(folder.path(), 1_000_000);
    let mut running = Running::start(["train", recipe.to_str().unwrap(), "--device", "cpu"]);
    running.wait_for_line(|line| line.starts_with("text, loss "));
    running.send("INT");
    running.send("INT");
    // Where the clean end was faster than the second signal, it is the answer.
    let (code, ran) = running.finish();
    assert!(matches!(code, Some(1 | 130)), "{code:?} {}", ran.stderr);
}

#[cfg(feature = "media")]
mod media {
    use super::*;
    use crate::tiny;
    use fulgur::datasets::media::{Sound, Video, WriteOptions, write_mp4};

    #[test]
    fn an_interrupted_generation_writes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny::generator(folder.path());
        let out = folder.path().join("out");
        fs::create_dir(&out).unwrap();
        let clip = out.join("clip.mp4");
        // More steps than anybody waits for.
        let mut running = Running::start([
            "generate",
            "a dog barks",
            "--json",
            "--device",
            "cpu",
            "--steps",
            "1000",
            "--duration",
            "8",
            "--model",
            model.to_str().unwrap(),
            "-o",
            clip.to_str().unwrap(),
        ]);
        running.wait_for_line(|line| line.starts_with("generate: "));
        running.send("INT");
        let sent = Instant::now();
        let (_, ran) = running.finish();
        assert!(sent.elapsed() < Duration::from_secs(20), "{:?}", sent.elapsed());
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
        let last = ran.stderr.lines().last().unwrap();
        assert_eq!(
            last,
            "error: stopped before the clip was finished; nothing was written"
        );
        assert_eq!(names(&out), [""; 0]);
    }

    #[test]
    fn interrupted_scoring_keeps_the_scores_so_far() {
        let folder = tempfile::tempdir().unwrap();
        let encoder = tiny::encoder(folder.path());
        let clips = folder.path().join("clips");
        fs::create_dir(&clips).unwrap();
        let frames = (0..48u8).flat_map(|i| vec![5 * i; 96 * 96 * 3]).collect();
        let video = Video::new(frames, 96, 96, 12.0).unwrap();
        let sound = Sound::new((0..64_000).map(|i| (i as f32 * 0.1).sin()).collect(), 1, 16_000).unwrap();
        let first = clips.join("0000.mp4");
        write_mp4(&first, &video, Some(&sound), &WriteOptions::default()).unwrap();
        // Many times what is scored before the first line of progress.
        let total = 4000;
        for i in 1..total {
            fs::hard_link(&first, clips.join(format!("{i:04}.mp4"))).unwrap();
        }
        let mut running = Running::start([
            "score",
            "--json",
            "--jobs",
            "1",
            "--encoder",
            encoder.to_str().unwrap(),
            clips.to_str().unwrap(),
        ]);
        running.wait_for_line(|line| line.starts_with("score: ") && !line.starts_with("score: 0/"));
        running.send("INT");
        let (_, ran) = running.finish();
        assert_eq!(ran.code, 1, "done in part: {}", ran.stderr);
        let report = ran.json();
        let n = report["n"].as_u64().unwrap();
        assert!(n > 0 && n < total, "{n} of {total}");
        assert_eq!(report["results"].as_array().unwrap().len() as u64, n);
    }

    #[test]
    fn an_interrupted_preparation_writes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let Some(arguments) = training::real_recipe(folder.path()) else {
            return;
        };
        let mut command = fulgur();
        command.current_dir(folder.path()).args(arguments);
        let mut running = Running::spawn(command);
        running.wait_for_line(|line| line.starts_with("teacher: "));
        running.send("INT");
        let (_, ran) = running.finish();
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        let last = ran.stderr.lines().last().unwrap();
        assert!(
            last.ends_with("stopped while the teacher was asked; nothing was written"),
            "{last}"
        );
        assert_eq!(names(&folder.path().join("lessons")), [""; 0]);
        assert!(!folder.path().join("run").exists());
    }
}

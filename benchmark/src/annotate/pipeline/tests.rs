//! Runs that end early and go on, with stages that count how often they are asked.

use std::collections::HashMap;

use fulgur_datasets::media::{Picture, Sound};

use super::super::config::Filters;
use super::super::filter;
use super::super::precomputed::Precomputed;
use super::super::template::Template;
use super::*;

/// Answers by a rule and counts its questions; raises a flag at one of them.
#[derive(Default)]
struct Counting {
    asked: Mutex<HashMap<String, u32>>,
    left: AtomicU64,
    stop: Arc<AtomicBool>,
    fails: &'static str,
}

impl Counting {
    fn new(questions: u64, stop: &Arc<AtomicBool>) -> Self {
        Self {
            left: AtomicU64::new(questions),
            stop: Arc::clone(stop),
            ..Self::default()
        }
    }

    fn answer(&self, stage: &str, clip: Clip<'_>, text: String) -> Result<String, StageError> {
        if self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_err()
        {
            self.stop.store(true, Ordering::SeqCst);
            return Err(StageError::Stopped);
        }
        if self.fails == clip.id {
            return Err(StageError::Clip("no answer".to_owned()));
        }
        let mut asked = self.asked.lock().unwrap();
        *asked.entry(format!("{stage} {}", clip.id)).or_default() += 1;
        Ok(text)
    }
}

fn about() -> About {
    About {
        backend: "counting".to_owned(),
        model: Some("abacus".to_owned()),
        costly: true,
        ..About::default()
    }
}

impl FrameCaptioner for Counting {
    fn about(&self) -> About {
        about()
    }

    fn caption(&self, _: &[Picture], clip: Clip<'_>) -> Result<Vec<String>, StageError> {
        let text = self.answer("frames", clip, format!("the dog of {} runs", clip.id))?;
        Ok(vec![text.clone(), text])
    }
}

impl AudioCaptioner for Counting {
    fn about(&self) -> About {
        about()
    }

    fn caption(&self, _: Option<&Sound>, clip: Clip<'_>) -> Result<Vec<String>, StageError> {
        self.answer("audio", clip, "a bell in the tower".to_owned())
            .map(|text| vec![text])
    }
}

impl Merger for Counting {
    fn about(&self) -> About {
        about()
    }

    fn merge(&self, video: &str, audio: &str, clip: Clip<'_>) -> Result<String, StageError> {
        self.answer("merge", clip, format!("{video} and {audio}."))
    }
}

fn input(folder: &Path, clips: usize) -> PathBuf {
    let path = folder.join("in.jsonl");
    let rows: String = (0..clips)
        .map(|i| format!("{{\"id\":\"clip{i}\",\"number\":{i}}}\n"))
        .collect();
    std::fs::write(&path, rows).unwrap();
    path
}

fn options(folder: &Path, name: &str, cancel: &Arc<AtomicBool>) -> Options {
    let output = folder.join(format!("{name}.jsonl"));
    Options {
        input: folder.join("in.jsonl"),
        left_out: output.with_extension("left-out.jsonl"),
        work: output.with_extension("work"),
        output,
        settings: BTreeMap::new(),
        restart: false,
        jobs: 3,
        duplicates: true,
        clips_per_video: 0,
        times: false,
        dry_run: false,
        cancel: Arc::clone(cancel),
    }
}

fn stages(counting: &Arc<Counting>) -> Stages {
    Stages {
        frames: Some(Arc::clone(counting) as Arc<dyn FrameCaptioner>),
        audio: Some(Arc::clone(counting) as Arc<dyn AudioCaptioner>),
        merge: Some(Arc::clone(counting) as Arc<dyn Merger>),
        filters: filter::of(&Filters::default()),
        ..Stages::default()
    }
}

#[test]
fn no_stage_is_asked_twice_however_often_a_run_ends() {
    let folder = tempfile::tempdir().unwrap();
    input(folder.path(), 20);
    let never: Arc<AtomicBool> = Arc::default();
    let patient = Arc::new(Counting::new(u64::MAX, &never));
    let whole = run(
        &stages(&patient),
        &options(folder.path(), "whole", &never),
        &|_| {},
    )
    .unwrap();
    assert_eq!(
        (whole.clips, whole.annotated, whole.complete, whole.resumed),
        (20, 20, true, 0)
    );

    let mut asked: HashMap<String, u32> = HashMap::new();
    let mut runs = 0;
    loop {
        let stop: Arc<AtomicBool> = Arc::default();
        let hasty = Arc::new(Counting::new(7, &stop));
        let report = run(&stages(&hasty), &options(folder.path(), "torn", &stop), &|_| {}).unwrap();
        for (question, count) in hasty.asked.lock().unwrap().iter() {
            *asked.entry(question.clone()).or_default() += count;
        }
        runs += 1;
        if report.complete {
            assert!(report.resumed > 0);
            break;
        }
        assert!(!folder.path().join("torn.jsonl").exists() && runs < 30);
    }
    // 60 questions, 7 a run.
    assert!(runs >= 9, "{runs}");
    assert_eq!(asked.len(), 60);
    assert!(asked.values().all(|count| *count == 1), "{asked:?}");
    for name in ["jsonl", "left-out.jsonl"] {
        let read = |run: &str| std::fs::read_to_string(folder.path().join(run).with_extension(name)).unwrap();
        assert_eq!(read("whole"), read("torn"));
    }
    let text = std::fs::read_to_string(folder.path().join("whole.jsonl")).unwrap();
    let first = text.lines().next().unwrap();
    assert!(
        first.contains("\"caption\":\"the dog of clip0 runs and a bell in the tower.\""),
        "{first}"
    );
    assert!(
        first.contains("\"caption\":{\"stage\":\"merge\",\"backend\":\"counting\",\"model\":\"abacus\"}"),
        "{first}"
    );
    assert!(first.ends_with("\"number\":0}"), "{first}");
}

#[test]
fn a_clip_that_fails_is_told_and_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    input(folder.path(), 5);
    let never: Arc<AtomicBool> = Arc::default();
    let broken = Arc::new(Counting {
        fails: "clip3",
        ..Counting::new(u64::MAX, &never)
    });
    let report = run(&stages(&broken), &options(folder.path(), "out", &never), &|_| {}).unwrap();
    assert_eq!((report.annotated, report.failed), (4, 1));
    assert_eq!(
        report.failures,
        [("clip3".to_owned(), "frames: no answer".to_owned())]
    );
    let left = std::fs::read_to_string(folder.path().join("out.left-out.jsonl")).unwrap();
    assert!(
        left.contains("\"error\":\"frames: no answer\"") && left.lines().count() == 1,
        "{left}"
    );
    let mended = Arc::new(Counting::new(u64::MAX, &never));
    let report = run(&stages(&mended), &options(folder.path(), "out", &never), &|_| {}).unwrap();
    assert_eq!((report.annotated, report.failed, report.resumed), (5, 0, 4));
    assert_eq!(mended.asked.lock().unwrap().len(), 3);
}

#[test]
fn rewriting_keeps_the_word_about_what_it_replaces() {
    let folder = tempfile::tempdir().unwrap();
    let path = input(folder.path(), 0);
    std::fs::write(
        &path,
        "{\"id\":\"a\",\"caption_video\":\"a dog  runs\",\"caption_audio\":\"a dog barks\"}\n",
    )
    .unwrap();
    let never: Arc<AtomicBool> = Arc::default();
    let stages = Stages {
        frames: Some(Arc::new(Counting::new(9, &never))),
        audio: Some(Arc::new(Precomputed::of_manifest())),
        rewrite: Some(Arc::new(Template)),
        merge: Some(Arc::new(Template)),
        ..Stages::default()
    };
    let seen: Mutex<Vec<Progress>> = Mutex::default();
    run(&stages, &options(folder.path(), "out", &never), &|progress| {
        seen.lock().unwrap().push(progress);
    })
    .unwrap();
    let text = std::fs::read_to_string(folder.path().join("out.jsonl")).unwrap();
    assert!(
        text.contains("\"caption\":\"The dog of a runs. A dog barks.\""),
        "{text}"
    );
    assert!(
        text.contains("\"rule\":\"rewrites {\\\"stage\\\":\\\"frames\\\""),
        "{text}"
    );
    let seen = seen.into_inner().unwrap();
    assert_eq!(
        seen,
        [Progress {
            done: 1,
            new: 1,
            total: 1
        }]
    );
}

#[test]
fn a_dry_run_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    input(folder.path(), 4);
    let never: Arc<AtomicBool> = Arc::default();
    let dry = Options {
        dry_run: true,
        ..options(folder.path(), "out", &never)
    };
    let counting = Arc::new(Counting::new(u64::MAX, &never));
    let report = run(&stages(&counting), &dry, &|_| {}).unwrap();
    assert_eq!((report.clips, report.annotated, report.complete), (4, 4, true));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

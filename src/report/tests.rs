//! Pages of runs that never were.

use std::fs;
use std::path::Path;

use super::*;

/// A log of `steps` steps with a spike, skipped steps and validations.
fn log(steps: u64) -> String {
    let mut text = String::new();
    for step in (10..=steps).step_by(10) {
        let x = step as f64 / steps as f64;
        let loss = if step == 500 {
            80.0
        } else {
            4.0 * (-4.0 * x).exp() + 0.05
        };
        let skipped = if step > 600 { ", \"skipped\": 2" } else { "" };
        text += &format!(
            "{{\"step\": {step}, \"elapsed_s\": {}, \"loss\": {loss}, \"pixels\": {}, \"<b>edges\": {}, \"lr\": {}, \
             \"grad_norm\": {}, \"samples_per_s\": 120.5{skipped}}}\n",
            step as f64 * 0.1,
            loss * 0.7,
            loss * 0.3,
            1e-3 * x,
            1.0 + x,
        );
        if step % 200 == 0 {
            text += &format!(
                "{{\"step\": {step}, \"elapsed_s\": {}, \"validation/error\": {}, \"validation/rank\": {x}}}\n",
                step as f64 * 0.1,
                if step == 800 { 0.125 } else { 1.0 - 0.5 * x }
            );
        }
    }
    text
}

fn run_folder(steps: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    put("metrics.jsonl", log(steps).as_bytes());
    put(
        "recipe.toml",
        b"task = \"codec\"\nseed = 3\n\n[train]\nmax_steps = 2000\nmax_seconds = 0.0\n# </pre><script>\n",
    );
    let samples = folder.path().join("samples/step-0000001000");
    fs::create_dir_all(&samples).unwrap();
    fs::write(samples.join("codec-001000.png"), b"\x89PNG picture").unwrap();
    fs::write(samples.join("voice-001000.wav"), b"RIFF sound").unwrap();
    folder
}

fn page(folder: &Path) -> String {
    Run::read(folder).unwrap().page()
}

#[test]
fn a_page_has_all_that_a_run_left() {
    let folder = run_folder(1000);
    let page = page(folder.path());
    for words in [
        "Training of <b>codec</b>, 50 % done",
        "<dt>Steps</dt><dd>1,000<small>of 2,000</small></dd>",
        "<dt>Time of training</dt><dd>1 min 40 s</dd>",
        "<dt>Best validation</dt><dd>0.125<small>error at step 800</small></dd>",
        "<dt>Samples/s</dt><dd>120.5",
        "<dt>Skipped steps</dt><dd>2",
        "<figcaption>Loss<span>0.1233</span></figcaption>",
        "<figcaption>Parts of the loss</figcaption>",
        "<li><i class=\"c1\"></i>&lt;b&gt;edges</li>",
        "<figcaption>Norm of the gradient",
        "<figcaption>Learning rate",
        "<figcaption>Samples/s",
        "<tr><th>error</th><td>0.5</td><td>0.125<small>at 800</small></td>",
        "<figcaption>rank",
        "strokes on the axis",
        "Samples <small>of step 1,000</small>",
        "<img src=\"data:image/png;base64,iVBORyBwaWN0dXJl\" alt=\"codec-001000.png\">",
        "<audio controls preload=\"metadata\" src=\"data:audio/wav;base64,",
        "max_steps = 2000",
        "# &lt;/pre&gt;&lt;script&gt;",
        "Loss over steps, from 0.1233 to 80\"",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert!(!page.contains("Resumed") && !page.contains("could not be read"));
}

/// Nothing is loaded from anywhere, nothing runs, and every element is closed.
#[test]
fn a_page_needs_nothing_but_itself() {
    let folder = run_folder(1000);
    let page = page(folder.path());
    for foreign in [
        "<script", "http://", "https://", "url(", "@import", "<link", "<iframe", " on",
    ] {
        let hits = page.match_indices(foreign).filter(|(at, _)| {
            // An attribute `onload=` and the like; words may begin with "on".
            foreign != " on"
                || page[at + 3..]
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase())
                    .count()
                    > 0
                    && page[at + 3..]
                        .trim_start_matches(|c: char| c.is_ascii_lowercase())
                        .starts_with('=')
        });
        assert_eq!(hits.count(), 0, "{foreign}");
    }
    for element in [
        "main", "figure", "svg", "table", "details", "ul", "dl", "div", "p", "h2", "audio",
    ] {
        let opened =
            page.matches(&format!("<{element}>")).count() + page.matches(&format!("<{element} ")).count();
        assert_eq!(
            opened,
            page.matches(&format!("</{element}>")).count(),
            "{element}"
        );
    }
    assert!(page.len() < 200_000, "{}", page.len());
}

#[test]
fn a_long_run_gives_a_page_of_bounded_size() {
    let folder = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for step in 1..=200_000 {
        let loss = if step == 77_777 {
            1e4
        } else {
            1.0 + f64::from(step % 7)
        };
        text += &format!("{{\"step\": {step}, \"loss\": {loss}}}\n");
    }
    fs::write(folder.path().join("metrics.jsonl"), text).unwrap();
    let run = Run::read(folder.path()).unwrap();
    assert_eq!(run.metrics.curve("loss").unwrap().highest(), Some((77_777, 1e4)));
    let page = run.page();
    assert!(page.len() < 100_000, "{}", page.len());
    // Without a recipe, validations, samples or other curves these are not there.
    for words in [
        "<details>",
        "<h2>Validation",
        "<h2>Samples",
        "Learning rate",
        "class=\"bar\"",
    ] {
        assert!(!page.contains(words), "{words}");
    }
    assert!(page.contains("Training run, not finished"));
}

#[test]
fn resumed_sessions_are_marked_by_their_event_files() {
    let folder = run_folder(1000);
    for step in [0, 300, 700] {
        tensorboard::EventFile::create(folder.path(), step).unwrap();
    }
    fs::write(
        folder.path().join("events.out.tfevents.7.other"),
        b"of another program",
    )
    .unwrap();
    fs::create_dir(folder.path().join("model")).unwrap();
    let run = Run::read(folder.path()).unwrap();
    assert_eq!(run.metrics.resumed, [300, 700]);
    assert!(run.finished);
    let page = run.page();
    assert!(page.contains("<dt>Resumed</dt><dd>2 times<small>after step 300, 700</small></dd>"));
    assert!(page.contains("class=\"r\"") && page.contains(", finished</p>"));
}

#[test]
fn the_summary_is_that_of_the_log() {
    let folder = run_folder(1000);
    let run = Run::read(folder.path()).unwrap();
    assert_eq!(run.best(), Some(("error", 800, 0.125)));
    assert!((run.loss().unwrap() - (4.0 * (-4.0f64).exp() + 0.05)).abs() < 1e-12);
    assert_eq!(run.name, folder.path().file_name().unwrap().to_str().unwrap());
}

#[test]
fn folders_of_other_things_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let message = |path: &Path| Run::read(path).unwrap_err().to_string();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let silent = folder.path().join("silent");
    fs::create_dir(&silent).unwrap();
    fs::write(silent.join("metrics.jsonl"), "").unwrap();
    for (path, words) in [
        (folder.path().join("absent"), "there is no such folder"),
        (file, "a file, expected the folder of a run"),
        (empty, "no metrics.jsonl in it"),
        (silent, "nothing is logged yet"),
    ] {
        let message = message(&path);
        assert!(message.contains(words) && !message.contains('\n'), "{message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    }
}

//! The models that come with the program do what their cards say, from the prompt to the file that a player opens.

use std::path::Path;

use candle_core::{Device, Tensor};
use fulgur::benchmark::judge::Judges;
use fulgur::datasets::media::{ReadOptions, read_clip};

use crate::support::run;

fn models(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

/// Fewer steps than by default, for time: the clip is rougher, its content the same.
#[test]
fn the_builtin_generator_shows_and_sounds_what_the_prompt_says() {
    let folder = tempfile::tempdir().unwrap();
    let clip = folder.path().join("owl.mp4");
    let prompt = "a white owl hoots and drops in from the right side halfway through";
    let ran = run::<&std::ffi::OsStr>([
        "generate".as_ref(),
        prompt.as_ref(),
        "--json".as_ref(),
        "--steps".as_ref(),
        "6".as_ref(),
        "--device".as_ref(),
        "cpu".as_ref(),
        "-o".as_ref(),
        clip.as_ref(),
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(report["model"], "fulgur-builtin");
    let score = report["avhscore"].as_f64().unwrap();
    assert!(score > 0.15, "AVHScore {score}");

    let read = read_clip(&clip, &ReadOptions::default()).unwrap();
    let (video, sound) = (read.video.unwrap(), read.sound.unwrap());
    assert_eq!((video.frame_count, video.width, video.height), (48, 96, 96));
    assert_eq!(sound.sample_rate, 16_000);
    let judges = Judges::load(&models("judges"), &Device::Cpu).unwrap();
    let pixels: Vec<f32> = video
        .frames
        .iter()
        .map(|&byte| f32::from(byte) / 127.5 - 1.0)
        .collect();
    let frames = Tensor::from_vec(pixels, (1, 48, 96, 96, 3), &Device::Cpu).unwrap();
    let mut samples = sound.mono().samples;
    samples.resize(64_000, 0.0);
    let waves = Tensor::from_vec(samples, (1, 64_000), &Device::Cpu).unwrap();
    let verdict = judges.judge(&frames, &waves).unwrap().remove(0);
    let (things, motions) = (&judges.config().things, &judges.config().motions);
    assert_eq!(things[verdict.sound], "owl");
    assert_eq!(things[verdict.picture[0]], "owl");
    assert_eq!(motions[verdict.motion], "in_right");
    let contact = verdict.contact_s.unwrap();
    assert!((1.3..2.3).contains(&contact), "contact at {contact} s");
}

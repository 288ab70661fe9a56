//! Renders a contact sheet of composed scenes and reports the speed of rendering on one core.
//!
//!     cargo run -p fulgur-datasets --features testing --example scene_sheet -- OUT.png [THINGS_DIR [SPLIT [FIRST [COUNT]]]]
//!
//! THINGS_DIR is the folder of a prepared set of things; without it, or when it is `-`, the things are procedural
//! discs and squares. SPLIT is train, combination, wording, judge or prompts.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use fulgur_datasets::media::write_png;
use fulgur_datasets::scenes::{Composer, Options, Scene, Split};
use fulgur_datasets::things::Things;

const TIMED: u64 = 300;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |at: usize, default: &'static str| arguments.get(at).map_or(default, String::as_str);
    let out = arguments
        .first()
        .ok_or("usage: scene_sheet OUT.png [THINGS_DIR [SPLIT [FIRST [COUNT]]]]")?;
    let things = match text(1, "-") {
        "-" => Things::synthetic(40),
        folder => Things::load(Path::new(folder))?,
    };
    let (first, count): (u64, u64) = (text(3, "0").parse()?, text(4, "10").parse()?);
    let composer = Composer::new(things, &[], Options::default())?;
    let scenes: Vec<Scene> = match text(2, "train") {
        "prompts" => composer
            .held_out_prompts((first + count) as usize)
            .split_off(first as usize),
        name => {
            let split = match name {
                "train" => Split::Train,
                "combination" => Split::HeldOutCombination,
                "wording" => Split::HeldOutWording,
                "judge" => Split::Judge,
                other => {
                    let expected = "train, combination, wording, judge or prompts";
                    return Err(format!("split: found {other}, expected {expected}").into());
                }
            };
            (first..first + count)
                .map(|index| composer.scene(split, index))
                .collect()
        }
    };
    for scene in &scenes {
        eprintln!("{}\n    {}", scene.caption.text, scene.caption.canonical);
    }
    write_png(Path::new(out), &composer.sheet(&scenes, 2))?;
    let start = Instant::now();
    let bytes: usize = (0..TIMED)
        .map(|index| {
            let scene = composer.scene(Split::Train, index);
            composer.render_frames(&scene).len() + composer.render_sound(&scene).len()
        })
        .sum();
    let seconds = start.elapsed().as_secs_f64();
    eprintln!(
        "{:.0} clips/s on one core ({bytes} values)",
        TIMED as f64 / seconds
    );
    Ok(())
}

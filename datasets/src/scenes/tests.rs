//! What composed scenes promise, on procedural things.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use super::*;
use crate::media::Picture;
use crate::things::{SOUND_RATE, Things, Verb};

const SPLITS: [Split; 4] = [
    Split::Train,
    Split::HeldOutCombination,
    Split::HeldOutWording,
    Split::Judge,
];

/// Procedural things, every fourth of them plural and every third with a sound of several words.
fn things(n: usize) -> Things {
    let mut things = Things::synthetic(n);
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    for (i, thing) in things.0.iter_mut().enumerate() {
        let name = format!("{}{}x", letter(i), letter(i / 26));
        let verb = |finite: &str, gerund: &str| Verb {
            finite: finite.to_owned(),
            gerund: gerund.to_owned(),
        };
        thing.words.plural = i % 4 == 0;
        (thing.words.noun, thing.words.verb) = match (i % 4 == 0, i % 3 == 0) {
            (true, true) => (format!("bells {name}"), verb("ring out loud", "ringing out loud")),
            (true, false) => (format!("bells {name}"), verb("ring", "ringing")),
            (false, true) => (
                format!("a horn {name}"),
                verb("honks out loud", "honking out loud"),
            ),
            (false, false) => (format!("a horn {name}"), verb("honks", "honking")),
        };
        (thing.words.other_nouns, thing.words.other_verbs) = (Vec::new(), Vec::new());
    }
    things
}

fn pictures() -> Vec<Picture> {
    (0..8u8)
        .map(|i| Picture::new(vec![i * 30; 30 * 20 * 3], 30, 20, 3).unwrap())
        .collect()
}

fn composer() -> Composer {
    Composer::new(things(60), &pictures(), Options::default()).unwrap()
}

fn alone() -> Composer {
    let options = Options {
        two_things: 0.0,
        ..Options::default()
    };
    Composer::new(things(60), &pictures(), options).unwrap()
}

#[test]
fn a_scene_is_the_same_in_any_order_on_any_thread_and_in_any_composer() {
    let (first, second) = (composer(), composer());
    let render = |composer: &Composer, index: u64| {
        let scene = composer.scene(SPLITS[index as usize % 4], index);
        let sound: Vec<u32> = composer
            .render_sound(&scene)
            .iter()
            .map(|x| x.to_bits())
            .collect();
        (
            composer.render_frames(&scene),
            composer.render_mask(&scene),
            sound,
            scene,
        )
    };
    let parallel: Vec<_> = (0..16u64)
        .into_par_iter()
        .map(|index| render(&first, index))
        .collect();
    for index in (0..16u64).rev() {
        assert!(
            render(&second, index) == parallel[index as usize],
            "scene {index}"
        );
    }
    assert!((1..16).all(|index| parallel[index].0 != parallel[0].0));
    let other_seed = Options {
        seed: 1,
        ..Options::default()
    };
    let other = Composer::new(things(60), &pictures(), other_seed).unwrap();
    assert!(other.scene(Split::Train, 0).actors != first.scene(Split::Train, 0).actors);
}

#[test]
fn adding_a_frame_size_keeps_the_story() {
    let large = Options {
        clip: ClipSpec {
            width: 160,
            height: 112,
            fps: 24.0,
            duration_s: 1.5,
            sample_rate: 22_050,
        },
        ..Options::default()
    };
    let (small, large) = (composer(), Composer::new(things(60), &pictures(), large).unwrap());
    for index in 0..20 {
        let (a, b) = (small.scene(Split::Train, index), large.scene(Split::Train, index));
        assert_eq!(a.caption, b.caption);
        assert_eq!(large.render_frames(&b).len(), 36 * 160 * 112 * 3);
        assert_eq!(large.render_mask(&b).len(), 36 * 160 * 112);
        assert_eq!(large.render_sound(&b).len(), 33_075);
        let shares = a
            .actors
            .iter()
            .zip(&b.actors)
            .map(|(a, b)| (a.contact_s / 4.0, b.contact_s / 1.5));
        assert!(shares.into_iter().all(|(a, b)| (a - b).abs() < 1e-9));
    }
}

#[test]
fn boxes_and_mask_hold_every_pixel_that_a_thing_changes() {
    let composer = composer();
    let clip = composer.options().clip;
    let area = clip.width * clip.height;
    let (mut tilted, mut tight) = (0, 0);
    for index in 0..60 {
        let mut scene = composer.scene(SPLITS[index as usize % 4], index);
        scene.backdrop.floor = None;
        tilted += usize::from(scene.actors[0].tilt != 0.0);
        let (frames, mask) = (composer.render_frames(&scene), composer.render_mask(&scene));
        let empty = Scene {
            actors: Vec::new(),
            ..scene.clone()
        };
        let wall = composer.render_frames(&empty);
        for frame in 0..clip.frames() {
            for pixel in 0..area {
                let (x, y) = (pixel % clip.width, pixel / clip.width);
                let at = 3 * (frame * area + pixel);
                let changed = frames[at..at + 3] != wall[at..at + 3];
                let covered = mask[frame * area + pixel];
                let inside = scene
                    .actors
                    .iter()
                    .any(|actor| actor.boxes[frame].is_some_and(|held| held.contains(x, y)));
                assert!(
                    !changed || (inside && covered > 0),
                    "scene {index} frame {frame} ({x}, {y})"
                );
                assert!(covered == 0 || inside, "scene {index} frame {frame} ({x}, {y})");
            }
        }
        // Boxes are tight: those of one upright thing wholly in the frame lie within two pixels of what it covers.
        let [actor] = &scene.actors[..] else { continue };
        for (frame, held) in actor.boxes.iter().enumerate() {
            let Some(held) = held else { continue };
            let cut = held.x0 == 0 || held.y0 == 0 || held.x1 == clip.width || held.y1 == clip.height;
            if cut || actor.tilt != 0.0 || actor.motion == Motion::Shake {
                continue;
            }
            let covered: Vec<usize> = (0..area).filter(|i| mask[frame * area + i] > 0).collect();
            let columns = covered.iter().map(|i| i % clip.width);
            let (left, right) = (columns.clone().min().unwrap(), columns.max().unwrap());
            let (top, bottom) = (covered[0] / clip.width, covered[covered.len() - 1] / clip.width);
            assert!(
                left <= held.x0 + 2 && right + 3 >= held.x1,
                "scene {index}: {held:?}, {left} to {right}"
            );
            assert!(
                top <= held.y0 + 2 && bottom + 3 >= held.y1,
                "scene {index}: {held:?}, {top} to {bottom}"
            );
            tight += 1;
        }
    }
    assert!(tight > 100);
    assert!(tilted > 5);
}

#[test]
fn the_first_frame_at_rest_is_the_frame_of_contact() {
    let composer = alone();
    let clip = composer.options().clip;
    let area = clip.width * clip.height;
    let mut seen = HashSet::new();
    for index in 0..250 {
        let scene = composer.scene(Split::Train, index);
        let actor = &scene.actors[0];
        let appears = actor.motion.name().starts_with("appear");
        let falls = actor.motion.lands() && !actor.motion.name().starts_with("jump");
        let slides = actor.motion.name().starts_with("slide");
        if !(appears || falls || slides) {
            continue;
        }
        let mask = composer.render_mask(&scene);
        // Lowest covered row and mean covered column of a frame.
        let found = |frame: usize| {
            let covered: Vec<usize> = (0..area).filter(|i| mask[frame * area + i] > 127).collect();
            let columns: usize = covered.iter().map(|i| i % clip.width).sum();
            covered
                .last()
                .map(|i| ((i / clip.width) as f64, columns as f64 / covered.len() as f64))
        };
        let rest = found(clip.frames() - 1).unwrap();
        // What bounces leaves the ground at once.
        let off = if actor.motion == Motion::Bounce { 8.0 } else { 1.0 };
        let first = (0..clip.frames())
            .find(|&frame| {
                found(frame).is_some_and(|(lowest, middle)| {
                    appears || (lowest >= rest.0 - off && (middle - rest.1).abs() < 2.0)
                })
            })
            .unwrap() as f64;
        let contact = actor.contact_s * clip.fps - 0.5;
        let early = match actor.motion {
            Motion::Bounce => 1.6,
            _ if appears => 0.0,
            _ => 1.0,
        };
        let near = contact - early..=contact + 1.0;
        assert!(
            near.contains(&first),
            "{:?} {index}: frame {first}, contact {contact:.2}",
            actor.motion
        );
        seen.insert(actor.motion);
    }
    assert_eq!(seen.len(), 11, "{seen:?}");
}

#[test]
fn a_sound_starts_within_a_sample_of_its_contact() {
    let mut things = things(60);
    for thing in &mut things.0 {
        thing.sound = vec![0.5; SOUND_RATE as usize / 4];
    }
    let composer = Composer::new(things, &[], Options::default()).unwrap();
    let mut seconds = 0;
    for index in 0..100 {
        let scene = composer.scene(SPLITS[index as usize % 4], index);
        let sound = composer.render_sound(&scene);
        assert!(sound.iter().all(|x| (-1.0..=1.0).contains(x)));
        let first = sound.iter().position(|x| x.abs() > 0.03).unwrap();
        let exact = scene.actors[0].contact_s * 16_000.0;
        assert!(
            (first as f64 - exact).abs() <= 1.0,
            "scene {index}: {first}, {exact}"
        );
        for hit in scene.actors.iter().flat_map(|actor| &actor.hits).skip(1) {
            // Each further hit is a jump of the level, unless it falls into the fade at the end.
            let at = (hit.time_s * 16_000.0).ceil() as usize;
            if at + 200 < sound.len() {
                let (before, after) = (sound[at - 3], sound[at + 3]);
                assert!(
                    after > before + 0.02,
                    "scene {index}: hit at {at}, {before} to {after}"
                );
                seconds += 1;
            }
        }
    }
    assert!(seconds > 20);
}

#[test]
fn rate_and_gain_of_a_sound_are_as_stated() {
    let composer = alone();
    let scene = (0..)
        .map(|index| composer.scene(Split::Judge, index))
        .find(|scene| scene.actors[0].rate > 1.035 && scene.actors[0].hits.len() == 1)
        .unwrap();
    let louder = {
        let mut louder = scene.clone();
        louder.noise = 0.0;
        louder.actors[0].gain = 1.0;
        louder
    };
    let sound = composer.render_sound(&louder);
    let actor = &louder.actors[0];
    let recorded = &composer.things()[actor.thing].sound;
    let audible = sound.iter().rposition(|x| x.abs() > 1e-6).unwrap() as f64 / 16_000.0 - actor.contact_s;
    let expected = recorded.len() as f64 / 16_000.0 / actor.rate;
    assert!(
        (audible - expected).abs() < 0.02 || actor.contact_s + expected > 3.99,
        "{audible} {expected}"
    );
    let (peak, own) = (
        sound.iter().fold(0f32, |m, x| m.max(x.abs())),
        recorded.iter().fold(0f32, |m, x| m.max(x.abs())),
    );
    assert!((peak / own - 1.0).abs() < 0.05, "{peak} {own}");
}

#[test]
fn splits_share_no_combination_no_wording_and_no_look() {
    let composer = composer();
    let scenes = |split: Split| {
        (0..3000u64)
            .map(|index| composer.scene(split, index))
            .collect::<Vec<_>>()
    };
    let [train, combination, wording, judge] = SPLITS.map(scenes);
    let pairs = |scenes: &[Scene]| -> HashSet<(String, Motion)> {
        let actors = scenes.iter().flat_map(|scene| &scene.actors);
        actors.map(|actor| (actor.id.clone(), actor.motion)).collect()
    };
    let known = pairs(&train);
    assert!(known.is_disjoint(&pairs(&combination)));
    assert!(
        pairs(&wording)
            .iter()
            .chain(&pairs(&judge))
            .all(|(id, motion)| !is_held_out(id, *motion))
    );
    assert!(known.iter().all(|(id, motion)| !is_held_out(id, *motion)));
    assert!(pairs(&combination).len() > 60 && known.len() > 700);

    let texts = |scenes: &[Scene]| -> HashSet<String> {
        scenes.iter().map(|scene| scene.caption.text.clone()).collect()
    };
    let frames =
        |scenes: &[Scene]| -> HashSet<usize> { scenes.iter().map(|scene| scene.caption.frame).collect() };
    assert!(texts(&train).is_disjoint(&texts(&wording)));
    assert!(frames(&train).is_disjoint(&frames(&wording)));
    assert_eq!((frames(&train).len(), frames(&wording).len()), (21, 7));
    let reserved = [
        "plunge",
        "skid",
        "leap",
        "emerg",
        "hand side",
        "moments",
        "midpoint",
        "turn",
    ];
    for word in reserved {
        assert!(!texts(&train).iter().any(|text| text.contains(word)), "{word}");
        assert!(texts(&wording).iter().any(|text| text.contains(word)), "{word}");
    }

    for scene in &judge {
        assert!(scene.actors.iter().all(|actor| actor.tilt.abs() >= 0.05));
        let looks = match &scene.backdrop.paint {
            Paint::Radial(..) | Paint::Stripes(..) => true,
            Paint::Picture { index, .. } => index % 4 == 3,
            Paint::Plain(_) | Paint::Linear(..) => false,
        };
        assert!(looks, "{:?}", scene.backdrop);
    }
    for scene in train.iter().chain(&combination).chain(&wording) {
        assert!(
            scene
                .actors
                .iter()
                .all(|actor| actor.tilt == 0.0 && (0.97..1.03).contains(&actor.rate))
        );
        let looks = match &scene.backdrop.paint {
            Paint::Radial(..) | Paint::Stripes(..) => false,
            Paint::Picture { index, .. } => index % 4 != 3,
            Paint::Plain(_) | Paint::Linear(..) => true,
        };
        assert!(looks, "{:?}", scene.backdrop);
    }
    let gains = |scenes: &[Scene], two: bool| {
        let chosen = scenes.iter().filter(|scene| (scene.actors.len() == 2) == two);
        let gains: Vec<f32> = chosen
            .flat_map(|scene| &scene.actors)
            .map(|actor| actor.gain)
            .collect();
        gains
    };
    for two in [false, true] {
        let own = gains(&train, two);
        let (low, high) = own
            .iter()
            .fold((f32::MAX, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
        assert!(gains(&judge, two).iter().all(|gain| !(low..=high).contains(gain)));
    }
    let doubles = train.iter().filter(|scene| scene.actors.len() == 2).count();
    assert!((450..750).contains(&doubles), "{doubles}");
}

/// Words of which a caption must hold at least one, and which no other motion's words hold.
fn keywords(motion: Motion) -> &'static [&'static str] {
    match motion {
        Motion::DropMiddle | Motion::DropLeft | Motion::DropRight => &["down", "above", "from the top"],
        Motion::InLeft => &[
            "in from the left",
            "in from the upper left",
            "in from the top left",
        ],
        Motion::InRight => &[
            "in from the right",
            "in from the upper right",
            "in from the top right",
        ],
        Motion::Bounce => &["bounc"],
        Motion::SlideLeft => &["slid", "glid", "along the ground from the left", "skid"],
        Motion::SlideRight => &["slid", "glid", "along the ground from the right", "skid"],
        Motion::AppearLeft | Motion::AppearMiddle | Motion::AppearRight => &["appear", "show", "pop", "turn"],
        Motion::JumpOnce => &["once", "one jump"],
        Motion::JumpTwice => &["twice", "two"],
        Motion::Rise => &["below", "bottom"],
        Motion::Closer => &["closer", "far away", "near"],
        Motion::Shake => &["side to side", "back and forth"],
    }
}

fn sides(words: &str) -> [bool; 3] {
    [
        words.contains("left"),
        words.contains("middle") || words.contains("center"),
        words.contains("right"),
    ]
}

#[test]
fn captions_say_what_is_true_and_all_of_it() {
    let composer = composer();
    for split in SPLITS {
        for index in 0..2500 {
            let scene = composer.scene(split, index);
            let caption = &scene.caption;
            let said = |actor: usize, role: Role| -> Vec<&str> {
                let parts = caption
                    .parts
                    .iter()
                    .filter(|part| part.actor == actor && part.role == role);
                parts.map(|part| caption.words(part)).collect()
            };
            for (i, actor) in scene.actors.iter().enumerate() {
                let words = &composer.things()[actor.thing].words;
                let text = &caption.text;
                assert_eq!(said(i, Role::Thing), [words.noun.as_str()], "{text}");
                let [sound] = said(i, Role::Sound)[..] else {
                    panic!("{text}")
                };
                assert!(sound == words.verb.finite || sound == words.verb.gerund, "{text}");
                let [motion] = said(i, Role::Motion)[..] else {
                    panic!("{text}")
                };
                assert!(
                    keywords(actor.motion).iter().any(|word| motion.contains(word)),
                    "{motion}: {text}"
                );
                let from = [
                    actor.motion.side() == Some(Side::Left),
                    false,
                    actor.motion.side() == Some(Side::Right),
                ];
                assert_eq!(sides(motion), from, "{text}");
                let place = said(i, Role::Place);
                assert_eq!(place.len(), usize::from(actor.place_said), "{text}");
                for place in place {
                    let at = [Place::Left, Place::Middle, Place::Right].map(|at| at == actor.place);
                    assert_eq!(sides(place), at, "{text}");
                    let third = (actor.x / 32.0) as usize;
                    assert!(at[third.min(2)], "{text}: x is {}", actor.x);
                }
                let time = said(i, Role::Time);
                assert_eq!(time.len(), usize::from(actor.timing != Timing::Unsaid), "{text}");
                let (low, high) = actor.timing.range(4.0);
                assert!((low..=high).contains(&actor.contact_s));
                for time in time {
                    let kinds: [&[&str]; 3] = [
                        &["start", "beginning", "early", "first"],
                        &["half", "midway", "midpoint"],
                        &["end", "late", "last"],
                    ];
                    let told = kinds.map(|words| words.iter().any(|word| time.contains(word)));
                    let true_kind =
                        [Timing::Start, Timing::Halfway, Timing::End].map(|kind| kind == actor.timing);
                    assert_eq!(told, true_kind, "{text}");
                }
            }
            assert!(
                scene
                    .actors
                    .windows(2)
                    .all(|two| two[0].contact_s + 0.3 < two[1].contact_s)
            );
        }
    }
}

#[test]
fn captions_agree_in_number_and_are_clean() {
    let composer = alone();
    let mut forms: HashMap<(usize, bool), usize> = HashMap::new();
    for (split, index) in SPLITS
        .into_iter()
        .flat_map(|split| (0..2500).map(move |index| (split, index)))
    {
        let scene = composer.scene(split, index);
        let text = format!(" {} ", scene.caption.text)
            .replace("one jump ", "")
            .replace("two jumps ", "");
        let plural = composer.things()[scene.actors[0].thing].words.plural;
        let wrong: &[&str] = if plural {
            &[
                " it ", " it:", " is ", " starts ", " drops ", " jumps ", " slides ", " rings ",
            ]
        } else {
            &[" they ", " them ", " are ", " start ", " appear ", " jump "]
        };
        let bare = scene.caption.text.contains("watch ");
        for word in wrong
            .iter()
            .filter(|word| !(bare && !plural && [" appear ", " jump "].contains(word)))
        {
            let time_phrase =
                *word == " start " && (text.contains("the start ") || text.contains("very start "));
            assert!(!text.contains(word) || time_phrase, "{word} in {text}");
        }
        let untidy = ["  ", " ,", " :", ",,", "{", "}"];
        assert!(
            untidy.iter().all(|mark| !scene.caption.text.contains(mark)),
            "{text}"
        );
        assert!(scene.caption.text.is_ascii() && scene.caption.text.trim() == scene.caption.text);
        *forms.entry((scene.caption.frame, plural)).or_default() += 1;
    }
    assert_eq!(forms.len(), 2 * 19, "every frame occurs in both numbers");
}

#[test]
fn captions_vary() {
    let composer = composer();
    let scenes = (0..2000).map(|index| composer.scene(Split::Train, index));
    let texts: HashSet<String> = scenes.map(|scene| scene.caption.text).collect();
    assert!(texts.len() > 1900, "{}", texts.len());
}

#[test]
fn held_out_prompts_take_turns_and_do_not_depend_on_their_number() {
    let composer = composer();
    let prompts = composer.held_out_prompts(200);
    assert_eq!(prompts[..20], composer.held_out_prompts(20));
    let mut seen = HashSet::new();
    let things = things(60);
    let held = things
        .iter()
        .flat_map(|thing| Motion::ALL.map(|motion| is_held_out(&thing.id, motion)));
    let all = held.filter(|&held| held).count();
    for prompt in &prompts {
        let [actor] = &prompt.actors[..] else {
            panic!("one thing a prompt")
        };
        assert!(is_held_out(&actor.id, actor.motion));
        seen.insert((actor.thing, actor.motion));
    }
    assert_eq!(seen.len(), all.min(200), "every held-out pair has its turn");
    let texts: HashSet<&str> = prompts
        .iter()
        .map(|prompt| prompt.caption.text.as_str())
        .collect();
    assert!(texts.len() > 190);
}

#[test]
fn bad_options_and_things_are_refused_by_name() {
    let fails = |things: Things, pictures: &[Picture], options: Options| {
        Composer::new(things, pictures, options)
            .err()
            .expect("refused")
            .to_string()
    };
    let with = |clip: ClipSpec| Options {
        clip,
        ..Options::default()
    };
    let clip = ClipSpec::default();
    assert!(fails(things(3), &[], with(ClipSpec { width: 0, ..clip })).starts_with("width: found 0"));
    assert!(
        fails(
            things(3),
            &[],
            with(ClipSpec {
                fps: f64::NAN,
                ..clip
            })
        )
        .starts_with("fps: found NaN")
    );
    let long = ClipSpec {
        duration_s: 1e9,
        ..clip
    };
    assert!(fails(things(3), &[], with(long)).starts_with("duration_s: found 1000000000"));
    assert!(fails(Things::default(), &[], Options::default()).starts_with("things: found 0 things"));
    let few = Options {
        motions: vec![Motion::Bounce],
        ..Options::default()
    };
    assert!(fails(things(1), &[], few).contains("expected combinations for every split"));
    let mut broken = things(2);
    broken.0[1].cutout.rgba.pop();
    assert!(fails(broken, &[], Options::default()).contains("thing thing_001: cutout"));
    let mut silent = things(2);
    silent.0[0].sound.clear();
    assert!(fails(silent, &[], Options::default()).contains("thing thing_000: sound: found 0 samples"));
    let clear = Picture::new(vec![0; 16], 2, 2, 4).unwrap();
    assert!(fails(things(3), &[clear], Options::default()).starts_with("pictures: found 2x2 with 4"));
}

#[test]
fn a_sheet_holds_all_scenes() {
    let composer = composer();
    let scenes: Vec<Scene> = (0..3).map(|index| composer.scene(Split::Train, index)).collect();
    let sheet = composer.sheet(&scenes, 2);
    assert_eq!(sheet.width, 2 * 12 * 96 + 4);
    assert_eq!(sheet.pixels.len(), sheet.width * sheet.height * 3);
    let colours: HashSet<&[u8]> = sheet.pixels.chunks_exact(3).collect();
    assert!(colours.len() > 1000);
}

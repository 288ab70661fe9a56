//! Procedural things for tests, so that they need no fetched data.

use fulgur_kernels::philox::Philox;

use super::{Cutout, Origin, SOUND_RATE, Source, Thing, Things, Verb, Words};

const SIDE: u32 = 64;

impl Things {
    /// `n` different things: coloured discs, squares and diamonds with decaying tones of their own pitch.
    pub fn synthetic(n: usize) -> Self {
        Self((0..n).map(synthetic_thing).collect())
    }
}

fn synthetic_thing(index: usize) -> Thing {
    let mut random = Philox::new(index as u64, 0);
    let colour: [u8; 3] = std::array::from_fn(|_| (random.next_u32() % 200) as u8 + 40);
    let pitch = 200.0 * 1.07f32.powi(index as i32 % 40);
    let sound = (0..SOUND_RATE as usize / 2).map(|i| {
        let t = i as f32 / SOUND_RATE as f32;
        0.3 * (-6.0 * t).exp() * (std::f32::consts::TAU * pitch * t).sin()
    });
    let origin = |path: String| Origin {
        package: "synthetic".to_owned(),
        path,
        licence: "CC0-1.0".to_owned(),
        holders: String::new(),
    };
    Thing {
        id: format!("thing_{index:03}"),
        words: Words {
            noun: format!("a thing number {index}"),
            verb: Verb {
                finite: "rings".to_owned(),
                gerund: "ringing".to_owned(),
            },
            plural: false,
            other_nouns: vec![format!("a toy number {index}")],
            other_verbs: vec![Verb {
                finite: "sounds".to_owned(),
                gerund: "sounding".to_owned(),
            }],
        },
        cutout: synthetic_cutout(index % 3, colour),
        sound: sound.collect(),
        source: Source {
            picture: origin(format!("picture {index}")),
            sound: origin(format!("sound {index}")),
        },
    }
}

fn synthetic_cutout(form: usize, colour: [u8; 3]) -> Cutout {
    let centre = (SIDE as f32 - 1.0) / 2.0;
    let mut rgba = Vec::with_capacity((SIDE * SIDE * 4) as usize);
    for y in 0..SIDE {
        for x in 0..SIDE {
            let (dx, dy) = ((x as f32 - centre).abs(), (y as f32 - centre).abs());
            let inside = match form {
                0 => dx.hypot(dy) <= centre,
                1 => true,
                _ => dx + dy <= centre,
            };
            rgba.extend(if inside {
                [colour[0], colour[1], colour[2], 255]
            } else {
                [0; 4]
            });
        }
    }
    Cutout {
        width: SIDE,
        height: SIDE,
        rgba,
    }
}

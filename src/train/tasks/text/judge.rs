//! What judges a text encoder: agreement with its teacher, and whether free prompts find the thing that they mean.

use candle_core::{Device, Result as CandleResult, Tensor};
use fulgur_tavdiffusion::text::corpus::Subject;
use fulgur_tavdiffusion::text::distil::spearman;

/// Prompts in words of their own, with the ids of the things that they may mean. None of them is ever trained on.
pub(super) const PROMPTS: &[(&str, &[&str])] = &[
    ("a hound bays at the moon", &["dog", "cartoon_dog"]),
    ("someone's pet pooch woofs", &["dog", "cartoon_dog"]),
    ("a kitty mews for milk", &["cat", "black_cat"]),
    ("farm bird announcing the dawn", &["rooster"]),
    ("a mama bird with her little chicks", &["hen", "chickens"]),
    ("the king of the jungle roars", &["lion"]),
    ("striped jungle cat snarling", &["tiger"]),
    ("a huge grey animal with a trunk trumpets", &["elephant"]),
    ("a pony whinnies", &["horse", "cartoon_horse"]),
    ("a stubborn mule goes hee-haw", &["donkey"]),
    (
        "a dairy cow mooing in the meadow",
        &["cow", "white_cow", "spotted_cow"],
    ),
    ("baby sheep going baa", &["lamb", "sheep", "cartoon_sheep"]),
    ("a piggy oinks in the mud", &["pig", "pink_pig"]),
    ("a toad goes ribbit by the pond", &["frog"]),
    ("an ape beats its chest", &["gorilla"]),
    ("a bumble bee buzzing around flowers", &["bee"]),
    ("night bird going hoo hoo", &["owl", "cartoon_owl"]),
    ("a black raven gives a harsh caw", &["crow"]),
    ("a killer whale swims by", &["orca"]),
    ("bunny rabbit", &["rabbit"]),
    ("someone fiddles a lively tune", &["violin"]),
    ("a pianist at the keyboard", &["piano"]),
    ("heavy metal guitar solo", &["electric_guitar"]),
    ("a jazz sax melody", &["saxophone"]),
    ("a squeezebox wheezes a polka", &["accordion"]),
    (
        "a drummer plays the drum set",
        &["drum_kit", "snare_drum", "drum", "floor_tom"],
    ),
    (
        "brass horn fanfare",
        &["trumpet", "french_horn", "trombone", "tuba"],
    ),
    ("a fire engine rushes past with its siren on", &["fire_truck"]),
    ("an old locomotive chugs along", &["steam_train"]),
    ("a chopper hovers in the sky", &["helicopter"]),
    ("thunder and a flash in a storm", &["lightning"]),
    ("my morning wake-up alarm goes off", &["alarm_clock"]),
    ("the phone is ringing", &["telephone"]),
    ("an audience applauds", &["hands"]),
    ("a spooky spirit wails", &["ghost"]),
    ("hoovering the carpet", &["vacuum_cleaner"]),
    ("water boils for tea", &["kettle"]),
    ("cutting paper", &["scissors"]),
    ("a carpenter drives a nail", &["hammer", "mallet"]),
    ("an explosion", &["bomb", "firecracker"]),
];

/// A thing that a prompt may mean.
pub(super) struct Candidate {
    pub(super) id: String,
    pub(super) subject: Subject,
}

impl Candidate {
    /// Every name with every verb.
    fn phrases(&self) -> Vec<String> {
        let Subject { nouns, verbs } = &self.subject;
        let mut phrases = Vec::new();
        for noun in nouns {
            phrases.extend(verbs.iter().map(|(finite, _)| format!("{noun} {finite}")));
        }
        phrases
    }
}

/// How many prompts find their thing among all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Found {
    /// Prompts whose thing is known.
    pub(super) asked: usize,
    /// The nearest thing is the right one.
    pub(super) first: usize,
    /// The right one is among the five nearest.
    pub(super) five: usize,
}

/// Looks up every prompt of [`PROMPTS`]; `encode` turns sentences into unit rows `[B, s]`.
pub(super) fn find(
    candidates: &[Candidate],
    encode: &dyn Fn(&[String]) -> CandleResult<Tensor>,
) -> CandleResult<Found> {
    let known = |ids: &[&str]| {
        candidates
            .iter()
            .any(|candidate| ids.contains(&candidate.id.as_str()))
    };
    let asked: Vec<_> = PROMPTS.iter().filter(|(_, ids)| known(ids)).collect();
    if asked.is_empty() {
        return Ok(Found::default());
    }
    let mut phrases = Vec::new();
    let mut owners = Vec::new();
    for (owner, candidate) in candidates.iter().enumerate() {
        let own = candidate.phrases();
        owners.extend(std::iter::repeat_n(owner, own.len()));
        phrases.extend(own);
    }
    let prompts: Vec<String> = asked.iter().map(|(prompt, _)| (*prompt).to_owned()).collect();
    let scores = encode(&prompts)?
        .matmul(&encode(&phrases)?.t()?)?
        .to_vec2::<f32>()?;
    let mut found = Found {
        asked: asked.len(),
        ..Found::default()
    };
    for ((_, ids), row) in asked.iter().zip(scores) {
        let mut best = vec![f32::NEG_INFINITY; candidates.len()];
        for (&owner, score) in owners.iter().zip(row) {
            best[owner] = best[owner].max(score);
        }
        let mut order: Vec<usize> = (0..best.len()).collect();
        order.sort_by(|&i, &j| best[j].total_cmp(&best[i]));
        let right = |&i: &usize| ids.contains(&candidates[i].id.as_str());
        found.first += usize::from(order.first().is_some_and(right));
        found.five += usize::from(order.iter().take(5).any(right));
    }
    Ok(found)
}

/// Mean distance `1 - cosine` of unit rows `[B, s]`, and the rank correlation of all pairs within either.
pub(super) fn agreement(student: &Tensor, teacher: &Tensor) -> CandleResult<(f64, Option<f64>)> {
    let (student, teacher) = (student.to_device(&Device::Cpu)?, teacher.to_device(&Device::Cpu)?);
    let cosine = (&student * &teacher)?.sum(1)?.mean_all()?.to_scalar::<f32>()?;
    let rows = student.dims2()?.0;
    let pairs = |x: &Tensor| -> CandleResult<Vec<f32>> {
        let all = x.matmul(&x.t()?)?.to_vec2::<f32>()?;
        Ok((0..rows).flat_map(|i| all[i][i + 1..].to_vec()).collect())
    };
    Ok((
        1.0 - f64::from(cosine),
        spearman(&pairs(&student)?, &pairs(&teacher)?),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_thing_is_found() -> CandleResult<()> {
        let candidate = |id: &str, noun: &str| Candidate {
            id: id.into(),
            subject: Subject {
                nouns: vec![noun.into()],
                verbs: vec![("sounds".into(), "sounding".into())],
            },
        };
        let candidates = [
            candidate("dog", "a dog"),
            candidate("piano", "a piano"),
            candidate("other", "a rock"),
        ];
        let turned = |swap: bool| {
            move |texts: &[String]| {
                let side = |text: &String| {
                    let music = text.contains("pian") != swap;
                    [
                        f32::from(u8::from(music)),
                        f32::from(u8::from(!music && !text.contains("rock"))),
                    ]
                };
                let values: Vec<f32> = texts.iter().flat_map(side).collect();
                Tensor::from_vec(values, (texts.len(), 2), &Device::Cpu)
            }
        };
        // Of the prompts about known things (dog twice, piano once), all are found.
        assert_eq!(
            find(&candidates, &turned(false))?,
            Found {
                asked: 3,
                first: 3,
                five: 3
            }
        );
        let one = find(&candidates[2..], &turned(false))?;
        assert_eq!(one, Found::default());
        Ok(())
    }

    #[test]
    fn a_student_like_its_teacher_agrees() -> CandleResult<()> {
        let rows = Tensor::new(&[[1f32, 0.0], [0.6, 0.8], [0.0, 1.0]], &Device::Cpu)?;
        let (distance, rank) = agreement(&rows, &rows)?;
        assert!(distance.abs() < 1e-6 && (rank.unwrap_or(0.0) - 1.0).abs() < 1e-9);
        let (distance, _) = agreement(&rows, &rows.neg()?)?;
        assert!((distance - 2.0).abs() < 1e-6);
        Ok(())
    }
}

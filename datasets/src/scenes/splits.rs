//! Splits: which combinations, wordings and appearances belong where.

use fulgur_kernels::philox::stream_of;
use serde::Serialize;

use super::motion::Motion;

/// One (thing, motion) pair in so many is held out.
const HELD_OUT_ONE_IN: u64 = 11;
/// Step between the residues of neighbouring motions, so that a thing's held-out motions differ in kind.
const MOTION_STEP: u64 = 5;

/// What a scene is for. The splits share no clip and, but for what each name says, no difficulty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For training: familiar combinations, familiar wordings.
    Train,
    /// Things in motions in which [`Split::Train`] never shows them; looks and wordings as in training.
    HeldOutCombination,
    /// Captions in sentences that [`Split::Train`] never says; looks and combinations as in training.
    HeldOutWording,
    /// For classifiers that judge: combinations as in training, other backgrounds, loudness and poses.
    Judge,
}

impl Split {
    /// Name in lower case with underscores.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOutCombination => "held_out_combination",
            Self::HeldOutWording => "held_out_wording",
            Self::Judge => "judge",
        }
    }
}

/// True where the thing named `id` is never shown in `motion` by [`Split::Train`]: one pair in eleven.
///
/// It depends on the name alone, so that adding things moves no other pair.
pub fn is_held_out(id: &str, motion: Motion) -> bool {
    (stream_of(id) % HELD_OUT_ONE_IN + MOTION_STEP * motion.class() as u64).is_multiple_of(HELD_OUT_ONE_IN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pair_in_eleven_is_held_out_and_every_thing_has_one() {
        let mut held = 0;
        for thing in 0..500 {
            let id = format!("thing_{thing:03}");
            let n = Motion::ALL
                .into_iter()
                .filter(|&motion| is_held_out(&id, motion))
                .count();
            assert!((1..=2).contains(&n), "{id}: {n}");
            held += n;
        }
        let share = held as f64 / (500.0 * Motion::ALL.len() as f64);
        assert!((share - 1.0 / 11.0).abs() < 0.01, "{share}");
    }
}

//! Distillation: a student's sentence vectors follow a teacher's, one by one and as a neighbourhood.
//!
//! With unit rows p of the student and t of the teacher, over a batch:
//!
//! ```text
//! match     = mean(1 - p.t)
//! relation  = KL( softmax(t t^T / tau) || softmax(p t^T / tau) )        which sentences are close to which
//! recall    = cross-entropy of hidden pieces, read from their states    words stay in the states
//! ```

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_kernels::philox::Philox;

use super::encoder::{TextEncoder, TextStates};
use super::tokenizer::{MASK, START, Tokens};

/// Sharpness tau of neighbourhoods.
pub const TEMPERATURE: f64 = 0.05;

/// `mean(1 - p.t)` of unit rows `[B, s]`.
///
/// # Errors
/// Shapes that differ.
pub fn match_loss(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    (student * teacher)?.sum(D::Minus1)?.affine(-1.0, 1.0)?.mean_all()
}

/// Mean divergence of the student's neighbourhood of each sentence from the teacher's; unit rows `[B, s]`.
///
/// # Errors
/// Shapes that differ.
pub fn relation_loss(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    let to_teacher = teacher.t()?;
    let wanted = log_softmax(&(teacher.matmul(&to_teacher)? / TEMPERATURE)?, 1)?.detach();
    let found = log_softmax(&(student.matmul(&to_teacher)? / TEMPERATURE)?, 1)?;
    (wanted.exp()? * (wanted - found)?)?.sum(1)?.mean_all()
}

/// Mean cross-entropy of the pieces `targets` `[M]` `u32`, read from the tokens at `places` `[M]` (rows of the flattened
/// batch `[B L]`).
///
/// # Errors
/// A place outside the batch.
pub fn recall_loss(
    encoder: &TextEncoder,
    states: &TextStates,
    places: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    let chosen = states.states.flatten(0, 1)?.index_select(places, 0)?;
    let log = log_softmax(&encoder.recall(&chosen)?.to_dtype(DType::F32)?, 1)?;
    log.gather(&targets.unsqueeze(1)?, 1)?.mean_all()?.neg()
}

/// Pieces of a batch that [`recall_loss`] asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    /// Places in the flattened, padded batch.
    pub places: Vec<u32>,
    /// What stood there.
    pub targets: Vec<u32>,
}

impl Hidden {
    /// Chooses `share` of the pieces of `rows` and, as BERT does, hides four fifths of them behind [`MASK`], swaps one
    /// tenth for another piece and leaves one tenth, so that a state has to know its word and its company. At least
    /// one place is chosen, if need be the first start piece.
    pub fn draw(rows: &mut [Tokens], share: f32, vocabulary: usize, random: &mut Philox) -> Self {
        let length = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut hidden = Self::default();
        for (row, tokens) in rows.iter_mut().enumerate() {
            for (column, id) in tokens.ids.iter_mut().enumerate() {
                if *id <= MASK || !random.chance(share) {
                    continue;
                }
                hidden.places.push((row * length + column) as u32);
                hidden.targets.push(*id);
                match random.below(10) {
                    0 => {}
                    1 => *id = random.below(vocabulary) as u32,
                    _ => *id = MASK,
                }
            }
        }
        if hidden.places.is_empty() {
            hidden = Self {
                places: vec![0],
                targets: vec![START],
            };
        }
        hidden
    }

    /// Places and targets as tensors `[M]` `u32` on `device`.
    ///
    /// # Errors
    /// The device has no memory.
    pub fn tensors(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let on = |values: &[u32]| Tensor::from_slice(values, values.len(), device);
        Ok((on(&self.places)?, on(&self.targets)?))
    }
}

/// Spearman's rank correlation of two equally long lists; None for fewer than two different values in either.
pub fn spearman(a: &[f32], b: &[f32]) -> Option<f64> {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len().min(b.len());
    let mean = |x: &[f64]| x.iter().sum::<f64>() / n as f64;
    let (mean_a, mean_b) = (mean(&a), mean(&b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(&b) {
        let (x, y) = (x - mean_a, y - mean_b);
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    (aa > 0.0 && bb > 0.0).then(|| ab / (aa * bb).sqrt())
}

/// Ranks from 0; equal values share the mean of theirs.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for run in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let shared = first as f64 + (run.len() - 1) as f64 / 2.0;
        run.iter().for_each(|&i| ranks[i] = shared);
        first += run.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::PAD;

    fn unit_rows(rows: usize, seed: u64) -> Tensor {
        let mut random = Philox::new(seed, 0);
        let values: Vec<f32> = (0..rows * 6).map(|_| random.normal()).collect();
        let x = Tensor::from_vec(values, (rows, 6), &Device::Cpu).unwrap();
        x.broadcast_div(&x.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap())
            .unwrap()
    }

    #[test]
    fn losses_vanish_for_the_teacher_alone() -> Result<()> {
        let (teacher, other) = (unit_rows(5, 1), unit_rows(5, 2));
        for loss in [match_loss, relation_loss] {
            assert!(loss(&teacher, &teacher)?.to_scalar::<f32>()?.abs() < 1e-5);
            assert!(loss(&other, &teacher)?.to_scalar::<f32>()? > 0.1);
        }
        Ok(())
    }

    #[test]
    fn hidden_pieces_are_remembered_and_special_ones_left_alone() {
        let row = |ids: &[u32]| Tokens {
            ids: ids.to_vec(),
            truncated: false,
        };
        let long: Vec<u32> = std::iter::once(START).chain(10..400).collect();
        let before = [row(&[START, 7, 8]), row(&long)];
        let mut rows = before.clone();
        let hidden = Hidden::draw(&mut rows, 0.15, 500, &mut Philox::new(1, 0));
        assert!((30..90).contains(&hidden.places.len()));
        for (&place, &target) in hidden.places.iter().zip(&hidden.targets) {
            assert_eq!(
                before[place as usize / long.len()].ids[place as usize % long.len()],
                target
            );
        }
        let masked = rows[1].ids.iter().filter(|&&id| id == MASK).count();
        assert!(masked > hidden.places.len() / 2 && masked < hidden.places.len());
        assert_eq!((rows[0].ids[0], rows[1].ids[0]), (START, START));

        let mut blank = [row(&[START])];
        let hidden = Hidden::draw(&mut blank, 0.15, 500, &mut Philox::new(1, 0));
        assert_eq!(
            hidden,
            Hidden {
                places: vec![0],
                targets: vec![START]
            }
        );
        assert_ne!(PAD, START);
    }

    #[test]
    fn rank_correlation_ignores_monotone_changes() {
        let a = [0.1, 0.5, -2.0, 3.0, 0.5];
        let same: Vec<f32> = a.iter().map(|x: &f32| x.powi(3) + 1.0).collect();
        let opposite: Vec<f32> = a.iter().map(|x| -x).collect();
        assert!((spearman(&a, &same).unwrap() - 1.0).abs() < 1e-12);
        assert!((spearman(&a, &opposite).unwrap() + 1.0).abs() < 1e-12);
        assert_eq!(spearman(&a, &[1.0; 5]), None);
        assert_eq!(spearman(&[], &[]), None);
        // Ranks 0, 1.5, 1.5, 3 against 0, 2, 1, 3: 4.5 / sqrt(4.5 * 5).
        let tied = spearman(&[1.0, 2.0, 2.0, 3.0], &[1.0, 3.0, 2.0, 4.0]).unwrap();
        assert!((tied - 0.9_f64.sqrt()).abs() < 1e-12, "{tied}");
    }
}

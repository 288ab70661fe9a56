//! Masked tokens, as BERT is trained: of those that are chosen, four fifths become the mask, a tenth any token, and a tenth stay.

use candle_core::{Device, Result, Tensor};
use fulgur_kernels::philox::Philox;

/// Target of tokens that do not count.
pub(super) const IGNORED: u32 = u32::MAX;

/// `ids` `[B, N]` on the host with a `share` of them masked, and the targets: the tokens that were chosen, [`IGNORED`] elsewhere.
/// The mask is the last of `rows` rows. At least one token is chosen.
///
/// # Errors
/// A failing operation.
pub(super) fn mask(ids: &Tensor, rows: usize, share: f64, noise: &mut Philox) -> Result<[Tensor; 2]> {
    let shape = ids.shape().clone();
    let mut seen = ids.flatten_all()?.to_vec1::<u32>()?;
    let mut targets = vec![IGNORED; seen.len()];
    let tokens = (rows - 1).max(1) as u64;
    let forced = (noise.next_u64() % seen.len().max(1) as u64) as usize;
    for (at, (id, target)) in seen.iter_mut().zip(&mut targets).enumerate() {
        let (chosen, fate, other) = (noise.range(0.0, 1.0), noise.range(0.0, 1.0), noise.next_u64());
        if at != forced && f64::from(chosen) >= share {
            continue;
        }
        *target = *id;
        if fate < 0.8 {
            *id = (rows - 1) as u32;
        } else if fate < 0.9 {
            *id = (other % tokens) as u32;
        }
    }
    let tensor = |values| Tensor::from_vec(values, &shape, &Device::Cpu);
    Ok([tensor(seen)?, tensor(targets)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_masked_and_asked_for() {
        let ids: Vec<u32> = (0..10_000).map(|i| i % 50).collect();
        let ids = Tensor::from_vec(ids, (10, 1000), &Device::Cpu).unwrap();
        let [seen, targets] = mask(&ids, 51, 0.15, &mut Philox::named(1, "test")).unwrap();
        let list = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let (ids, seen, targets) = (list(&ids), list(&seen), list(&targets));
        let (mut chosen, mut masked, mut kept) = (0, 0, 0);
        for ((id, seen), target) in ids.into_iter().zip(seen).zip(targets) {
            if target == IGNORED {
                assert_eq!(seen, id);
                continue;
            }
            assert_eq!(target, id);
            assert!(seen <= 50);
            chosen += 1;
            masked += usize::from(seen == 50);
            kept += usize::from(seen == id);
        }
        assert!((1350..1650).contains(&chosen), "{chosen}");
        assert!(
            (0.77..0.83).contains(&(masked as f64 / chosen as f64)),
            "{masked} of {chosen}"
        );
        assert!(
            (0.07..0.14).contains(&(kept as f64 / chosen as f64)),
            "{kept} of {chosen}"
        );
        let one = Tensor::new(&[[7u32, 8]], &Device::Cpu).unwrap();
        let [_, targets] = mask(&one, 9, 1e-9, &mut Philox::named(1, "test")).unwrap();
        assert_eq!(
            list(&targets).iter().filter(|&&target| target != IGNORED).count(),
            1
        );
    }
}

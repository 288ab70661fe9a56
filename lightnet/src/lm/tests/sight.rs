//! Which tokens see which.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::embedding::Ids;

use super::{ALL, bidirectional, draw, far, shape};
use crate::lm::{Architecture, Config, LanguageModel};
use crate::params::Params;

/// Cosines and a two-sided TPE do not tell left from right; token shift does, and sees no padding.
#[test]
fn token_shift_tells_left_from_right() -> Result<()> {
    let model = |token_shift: bool, two: (bool, bool)| {
        let config = Config {
            token_shift,
            use_tpe: two.0,
            use_lrpe: two.1,
            lrpe_longest: Some(64),
            ..bidirectional()
        };
        let params = Params::random(5, &Device::Cpu);
        LanguageModel::new(&config, DType::F32, &params.builder())
    };
    let ids = draw(20, 31, "ids");
    let backwards: Vec<u32> = ids.iter().rev().copied().collect();
    let mirrored = |model: &LanguageModel| {
        let ahead = model.logits(&Ids::new(&ids, &[1, 20], 31)?)?.get_on_dim(1, 3)?;
        let behind = model
            .logits(&Ids::new(&backwards, &[1, 20], 31)?)?
            .get_on_dim(1, 16)?;
        far(&ahead, &behind)
    };
    assert!(mirrored(&model(false, (true, true))?)? < 1e-4);
    assert!(mirrored(&model(true, (true, true))?)? > 1e-2);

    let convolved = |taps: usize| {
        let config = Config {
            conv_size: Some(taps),
            use_tpe: true,
            use_lrpe: true,
            ..bidirectional()
        };
        let params = Params::random(6, &Device::Cpu);
        LanguageModel::new(&config, DType::F32, &params.builder())
    };
    assert!(mirrored(&convolved(3)?)? > 1e-2);

    // Without positions across the padding, what is behind it changes nothing.
    let mut other = ids.clone();
    other[15] = (other[15] + 1) % 31;
    let mask: Vec<u8> = (0..20).map(|at| u8::from(at < 15)).collect();
    let mask = Tensor::from_vec(mask, (1, 20), &Device::Cpu)?;
    let params = Params::random(7, &Device::Cpu);
    let config = Config {
        bidirectional: true,
        conv_size: Some(5),
        ..shape(Architecture::Lightnet)
    };
    let convolved = LanguageModel::new(&config, DType::F32, &params.builder())?;
    for plain in [model(true, (false, false))?, convolved] {
        let short = plain.logits(&Ids::new(&ids[..15], &[1, 15], 31)?)?;
        for ids in [&ids, &other] {
            let masked = plain.masked_logits(&Ids::new(ids, &[1, 20], 31)?, &mask)?;
            assert!(far(&masked.narrow(1, 0, 15)?, &short)? < 1e-4);
        }
    }
    let causal = Config {
        bidirectional: false,
        token_shift: true,
        ..shape(Architecture::Lightnet)
    };
    let line = causal.check().unwrap_err().to_string();
    assert!(
        line.starts_with("token_shift: only a bidirectional model"),
        "{line}"
    );
    Ok(())
}

/// In both directions every token sees every other one, but for padding, and the order is seen by positions alone.
#[test]
fn both_directions_see_all_but_padding() -> Result<()> {
    let model = |config: Config| {
        let params = Params::random(3, &Device::Cpu);
        LanguageModel::new(&config, DType::F32, &params.builder())
    };
    let ids = draw(20, 31, "ids");
    let logits = |model: &LanguageModel, ids: &[u32]| model.logits(&Ids::new(ids, &[1, 20], 31)?);
    let whole = model(bidirectional())?;
    let before = logits(&whole, &ids)?;
    let mut other = ids.clone();
    other[19] = (other[19] + 1) % 31;
    assert!(
        far(
            &before.narrow(1, 0, 1)?,
            &logits(&whole, &other)?.narrow(1, 0, 1)?
        )? > 1e-3
    );

    let plain = model(Config {
        bidirectional: true,
        ..shape(Architecture::Lightnet)
    })?;
    let mask: Vec<u8> = (0..20).map(|at| u8::from(at < 15)).collect();
    let mask = Tensor::from_vec(mask, (1, 20), &Device::Cpu)?;
    let masked = |ids: &[u32]| {
        plain
            .masked_logits(&Ids::new(ids, &[1, 20], 31)?, &mask)?
            .narrow(1, 0, 15)
    };
    assert!(far(&masked(&ids)?, &masked(&other)?)? < 1e-6);
    let short = plain.logits(&Ids::new(&ids[..15], &[1, 15], 31)?)?;
    assert!(far(&masked(&ids)?, &short)? < 1e-4);
    // Softmax attention sees as much, and as little of padding.
    let softmax = model(Config {
        bidirectional: true,
        ..shape(Architecture::Llama)
    })?;
    let first = |ids: &[u32]| logits(&softmax, ids)?.narrow(1, 0, 1);
    assert!(far(&first(&ids)?, &first(&other)?)? > 1e-3);
    let kept = softmax.masked_logits(&Ids::new(&other, &[1, 20], 31)?, &mask)?;
    let short = softmax.logits(&Ids::new(&ids[..15], &[1, 15], 31)?)?;
    assert!(far(&kept.narrow(1, 0, 15)?, &short)? < 1e-4);
    // Without positions the tokens are a set.
    let mut swapped = ids.clone();
    swapped.reverse();
    let reversed = logits(&plain, &swapped)?;
    assert!(
        far(
            &logits(&plain, &ids)?.get_on_dim(1, 3)?,
            &reversed.get_on_dim(1, 16)?
        )? < 1e-4
    );
    assert!(
        plain
            .extend(&Ids::new(&ids, &[1, 20], 31)?, &mut plain.start())
            .is_err()
    );
    Ok(())
}

#[test]
fn later_tokens_change_nothing_before_them() -> Result<()> {
    for architecture in ALL {
        let config = shape(architecture);
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let mut ids = draw(2 * 20, 31, "ids");
        let before = model.logits(&Ids::new(&ids, &[2, 20], 31)?)?;
        for at in [13, 33] {
            ids[at] = (ids[at] + 1) % 31;
        }
        let after = model.logits(&Ids::new(&ids, &[2, 20], 31)?)?;
        let part = |t: &Tensor, from, count| t.narrow(1, from, count);
        assert!(far(&part(&before, 0, 13)?, &part(&after, 0, 13)?)? < 1e-6);
        assert!(
            far(&part(&before, 13, 7)?, &part(&after, 13, 7)?)? > 1e-2,
            "{architecture:?}"
        );
    }
    Ok(())
}

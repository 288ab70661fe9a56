//! Architectures that are instances of others.

use candle_core::{DType, Device, Result};
use fulgur_kernels::embedding::Ids;

use super::{draw, far, shape};
use crate::lm::{Activation, Architecture, Config, DecaySchedule, LanguageModel};
use crate::params::Params;

/// HGRN2 with heads of width 1 is HGRN1.
#[test]
fn heads_of_one_channel_are_the_element_wise_recurrence() -> Result<()> {
    let params = Params::random(3, &Device::Cpu);
    let one = LanguageModel::new(&shape(Architecture::Hgrn1), DType::F32, &params.builder())?;
    let config = Config {
        num_attention_heads: 24,
        head_dim: Some(1),
        ..shape(Architecture::Hgrn2)
    };
    let two = LanguageModel::new(&config, DType::F32, &params.builder())?;
    let ids = Ids::new(&draw(100, 31, "ids"), &[2, 50], 31)?;
    assert!(far(&one.logits(&ids)?, &two.logits(&ids)?)? < 1e-4);
    Ok(())
}

/// Without frequencies cosFormer2 is TNL without decay and with plain values; with them, offsets alone count.
#[test]
fn cosines_weigh_offsets() -> Result<()> {
    let without = Config {
        use_tpe: false,
        ..shape(Architecture::Cosformer2)
    };
    let params = Params::random(3, &Device::Cpu);
    let builder = params.builder();
    let still = Config {
        use_lrpe: false,
        ..without.clone()
    };
    let linear = Config {
        value_act: Activation::None,
        decay_schedule: DecaySchedule::None,
        ..shape(Architecture::Tnl)
    };
    let ids = draw(30, 31, "ids");
    let run = |config: &Config| {
        LanguageModel::new(config, DType::F32, &builder)?.logits(&Ids::new(&ids, &[1, 30], 31)?)
    };
    assert_eq!(far(&run(&still)?, &run(&linear)?)?, 0.0);
    let turned = run(&without)?;
    assert!(far(&turned, &run(&still)?)? > 1e-2);
    // A state that is empty but stands further on.
    let model = LanguageModel::new(&without, DType::F32, &builder)?;
    let mut later = model.start();
    later.advance(1, 1000)?;
    let shifted = model.extend(&Ids::new(&ids, &[1, 30], 31)?, &mut later)?;
    assert!(far(&turned, &shifted)? < 1e-3, "{}", far(&turned, &shifted)?);
    Ok(())
}

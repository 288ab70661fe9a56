//! Frequencies of rotary positions, with the scalings that configurations of Hugging Face name.
//!
//! ```text
//! default   theta_j = base^(-2 j / D)
//! linear    theta_j / factor
//! llama3    with the wavelength w = 2 pi / theta_j and the context n of the first training:
//!           theta_j            where w < n / high
//!           theta_j / factor   where w > n / low
//!           between them (1 - s) theta_j / factor + s theta_j,   s = (n / w - low) / (high - low)
//! ```

use std::f64::consts::TAU;

use candle_core::{Device, Result, Tensor};
use fulgur_kernels::lrpe::rotary_frequencies;
use serde::{Deserialize, Serialize};

/// Rotary positions as `rope_parameters`, or `rope_scaling` in older files, describes them.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RopeParameters {
    /// Base of the frequencies; in older files it stands beside `rope_scaling`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// `default`, `linear` or `llama3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// An older name of `rope_type`.
    #[serde(skip_serializing_if = "Option::is_none", rename = "type")]
    pub old_type: Option<String>,
    /// By how much the longest wavelengths grow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Of `llama3`: wavelengths above the first context over this grow by `factor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// Of `llama3`: wavelengths below the first context over this stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// Of `llama3`: the context of the first training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<f64>,
    /// Only 1, which is all channels of a head, can be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
}

/// The frequencies of a mixer's positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary {
    /// Width D of a head, even.
    pub width: usize,
    /// Base of the frequencies.
    pub base: f64,
    /// How they are scaled.
    pub scaling: Scaling,
}

/// How frequencies are scaled, for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scaling {
    /// Not at all.
    #[default]
    None,
    /// All divided by a factor.
    Linear(f64),
    /// By wavelength, as in Llama 3.
    ByWavelength {
        /// Divides low frequencies.
        factor: f64,
        /// Where low frequencies begin: `context / low`.
        low: f64,
        /// Where high ones begin: `context / high`.
        high: f64,
        /// Of the first training.
        context: f64,
    },
}

impl RopeParameters {
    /// The scaling; `context` is what `max_position_embeddings` says.
    ///
    /// # Errors
    /// Names the field that is missing, is no positive number, or asks for what there is not.
    pub fn scaling(&self, context: Option<f64>) -> std::result::Result<Scaling, String> {
        let positive = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(format!(
                "rope_parameters.{name} is {value}, expected a positive number"
            )),
            None => Err(format!(
                "rope_parameters.{name} is missing, expected a positive number"
            )),
        };
        if let Some(part) = self.partial_rotary_factor
            && part != 1.0
        {
            return Err(format!(
                "rope_parameters.partial_rotary_factor is {part}, only 1 is supported"
            ));
        }
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref());
        match kind.unwrap_or("default") {
            "default" => Ok(Scaling::None),
            "linear" => Ok(Scaling::Linear(positive("factor", self.factor)?)),
            "llama3" => {
                let original = self.original_max_position_embeddings.or(context);
                let (low, high) = (
                    positive("low_freq_factor", self.low_freq_factor)?,
                    positive("high_freq_factor", self.high_freq_factor)?,
                );
                if high <= low {
                    return Err(format!(
                        "rope_parameters.high_freq_factor is {high}, expected more than low_freq_factor, {low}"
                    ));
                }
                Ok(Scaling::ByWavelength {
                    factor: positive("factor", self.factor)?,
                    low,
                    high,
                    context: positive("original_max_position_embeddings", original)?,
                })
            }
            other => Err(format!(
                "rope_parameters.rope_type is {other:?}, supported are default, linear, llama3"
            )),
        }
    }
}

impl Rotary {
    /// Frequencies `[D / 2]` in f64.
    ///
    /// # Errors
    /// The width is odd, or the base is no positive number.
    pub fn frequencies(&self, device: &Device) -> Result<Tensor> {
        let plain = rotary_frequencies(self.width, self.base, &Device::Cpu)?;
        let scaled: Vec<f64> = plain
            .to_vec1::<f64>()?
            .into_iter()
            .map(|theta| self.scaling.of(theta))
            .collect();
        Tensor::new(scaled, device)
    }
}

impl Scaling {
    fn of(&self, theta: f64) -> f64 {
        match *self {
            Self::None => theta,
            Self::Linear(factor) => theta / factor,
            Self::ByWavelength {
                factor,
                low,
                high,
                context,
            } => {
                let waves = context * theta / TAU;
                let share = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - share) * theta / factor + share * theta
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wavelengths_are_scaled_in_three_ranges() {
        let scaling = Scaling::ByWavelength {
            factor: 8.0,
            low: 1.0,
            high: 4.0,
            context: 100.0,
        };
        let theta = |wavelength: f64| TAU / wavelength;
        assert_eq!(scaling.of(theta(10.0)), theta(10.0));
        assert_eq!(scaling.of(theta(200.0)), theta(200.0) / 8.0);
        // A wavelength of 40: 2.5 waves, half way from 1 to 4.
        let middle = 0.5 * theta(40.0) / 8.0 + 0.5 * theta(40.0);
        assert!((scaling.of(theta(40.0)) - middle).abs() < 1e-15);
        assert_eq!(Scaling::Linear(4.0).of(1.0), 0.25);
    }

    #[test]
    fn what_there_is_not_is_named() {
        let said = |change: fn(&mut RopeParameters)| {
            let mut rope = RopeParameters {
                rope_type: Some("llama3".into()),
                factor: Some(8.0),
                low_freq_factor: Some(1.0),
                high_freq_factor: Some(4.0),
                ..Default::default()
            };
            change(&mut rope);
            rope.scaling(Some(32.0))
        };
        assert!(said(|_| ()).is_ok());
        for (change, words) in [
            (
                (|r| r.rope_type = Some("yarn".into())) as fn(&mut RopeParameters),
                "rope_type is \"yarn\"",
            ),
            (|r| r.factor = None, "rope_parameters.factor is missing"),
            (|r| r.factor = Some(-1.0), "factor is -1"),
            (|r| r.high_freq_factor = Some(1.0), "more than low_freq_factor, 1"),
            (
                |r| r.partial_rotary_factor = Some(0.5),
                "partial_rotary_factor is 0.5",
            ),
        ] {
            let line = said(change).unwrap_err();
            assert!(line.contains(words), "{line}");
        }
    }
}

//! LightNet without causality, for models that restore masked tokens: the names of the causal form, and the recurrence of
//! [`crate::mixer::lightnet`].
//!
//! ```text
//! K = softmax over tokens of x W_k      S = LRPE(K)^T V      O = LRPE(silu(x W_q)) S
//! y = (norm(O) * sigmoid(x W_1 W_2)) W_o
//! ```

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::additive::{NonCausal, noncausal, projected};

use super::parts::Theta;
use super::projections::{Projections, queries_keys_values};
use super::{CausalContext, Memory};
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct BidirectionalLightNet {
    width: usize,
    /// Whether queries and values have the activations that the kernel has.
    is_plain: bool,
    has_convolutions: bool,
    projections: Projections,
    theta: Option<Theta>,
}

impl BidirectionalLightNet {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let columns = queries_keys_values(config, Activation::None);
        Ok(Self {
            width: config.head_width(),
            is_plain: (config.linear_act, config.value_act) == (Activation::Silu, Activation::None),
            has_convolutions: config.conv_size.is_some(),
            projections: Projections::new(config, &columns, true, vb)?,
            theta: Theta::shared(config, vb)?,
        })
    }

    /// As [`crate::linear::Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.projections.round_apart(dtype)
    }

    /// Mixes `x` `[B, N, d]`; tokens where `mask` `[B, N]` is zero enter nothing. Of `memory` only the other parts of split
    /// sequences count.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &CausalContext<'_>,
        mask: Option<&Tensor>,
        mut memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let exchange = Memory::exchange(memory.as_deref());
        let wide = match mask {
            // A convolution would see padding.
            Some(mask) if self.has_convolutions => {
                let mask = mask.to_dtype(x.dtype())?.unsqueeze(2)?;
                self.projections
                    .wide(&x.broadcast_mul(&mask)?, memory.as_deref_mut())?
            }
            _ => self.projections.wide(x, memory)?,
        };
        let phase = self.phases(x.dim(1)?, context)?;
        let options = NonCausal {
            phase: phase.as_ref(),
            mask,
            exchange,
        };
        let o = if self.is_plain {
            projected(&wide, self.projections.heads, self.width, &options)?
        } else {
            let parts = self.projections.parts(&wide, None)?;
            let [q, k, v] = [0, 1, 2].map(|part| self.projections.heads(&parts[part]));
            noncausal(&q?, &k?, &v?, &options)?.0.flatten_from(2)?
        };
        self.projections.finish(&o, x, &[])
    }

    /// Phases of all channels, zero for those that do not turn.
    fn phases(&self, tokens: usize, context: &CausalContext<'_>) -> Result<Option<Tensor>> {
        let Some(theta) = &self.theta else {
            return Ok(None);
        };
        let phase = theta.phases(tokens, context)?;
        let still = self.width - phase.dim(D::Minus1)?;
        phase.pad_with_zeros(D::Minus1, 0, still).map(Some)
    }
}

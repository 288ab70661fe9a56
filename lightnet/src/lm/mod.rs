//! Language models: one skeleton, several token mixers.
//!
//! ```text
//! x = embedding[ids]            in some followed by TPE
//! x = x + mixer(norm(x))        for each layer
//! x = x + glu(norm(x))
//! logits = norm(x) W^T
//! ```
//!
//! | `model_type` | mixer | names of tensors |
//! |---|---|---|
//! | `llama` | softmax attention, rotary positions | Hugging Face transformers |
//! | `hgrn2` | gates tied to keys | flash-linear-attention |
//! | `lightnet` | additive recurrence; `bidirectional` for masked tokens | flash-linear-attention |
//! | `transnormer` | constant decays, full-rank gate | TransNormerLLM's published code |
//! | `tnl` | constant decays, low-rank gate | as flash-linear-attention names such parts |
//! | `cosformer2` | no decay, cosines of offsets | the same |
//! | `hgrn1` | element-wise gates | the same |
//! | `eos` | any expand, oscillation and shrink | the same |
//!
//! Any of them may have layers of softmax attention among its own (`attn`). Checkpoints of those libraries load as they are, by
//! [`LanguageModel::load`]. The residual stream is f32; branches compute in the type that a [`LanguageModel`] is asked for,
//! `BF16` on a GPU.
//!
//! Tokens go through all at once, for training, or piece by piece with a [`State`]: a prompt by [`LanguageModel::prefill`] in
//! the form for training, then single tokens by [`LanguageModel::step`], whose cost does not grow with what came before.
//!
//! [`classifier`] puts the same layers under a head that classifies whole sequences.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{DType, Device};
//! use fulgur_kernels::embedding::Ids;
//! use fulgur_lightnet::lm::{Architecture, Config, LanguageModel};
//! use fulgur_lightnet::params::Params;
//! let config = Config { hidden_size: 16, num_attention_heads: 2, ..Config::of(Architecture::Hgrn2) };
//! let model = LanguageModel::new(&config, DType::F32, &Params::random(1, &Device::Cpu).builder())?;
//! let mut state = model.start();
//! let after_prompt = model.prefill(&Ids::new(&[7, 3, 9], &[1, 3], 256)?, &mut state)?;
//! let after_next = model.step(&[4], &mut state)?;
//! assert_eq!((after_prompt.dims(), after_next.dims(), state.tokens()), (&[1, 256][..], &[1, 256][..], 4));
//! # Ok(()) }
//! ```

mod block;
pub mod classifier;
mod config;
pub mod generate;
mod glu;
mod kept;
mod layer;
pub mod likelihood;
mod load;
mod loan;
mod model;
mod replay;
mod rope;
pub mod sampling;
mod session;
mod state;
mod state_file;
mod tensor;
#[cfg(test)]
mod tests;
pub mod tokenizer;

pub use config::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, GateForm, Instance, Oscillation,
    OutputGate, OutputNorm, SoftmaxLayers, Source, Turn,
};
pub(crate) use layer::lower_bounds;
pub use load::expected_shapes;
pub use loan::Lender;
pub use model::LanguageModel;
pub use rope::{RopeParameters, Rotary, Scaling};
pub use session::{MOST_TOGETHER, Session, SessionError};
pub use state::State;
pub use state_file::StateFileError;
pub use tensor::Cut;

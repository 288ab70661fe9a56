//! Layers over several ranks (tensor parallelism): of each layer a rank has some heads and some columns of the gated linear unit.
//!
//! ```text
//! mixer   q, k, v, u = x W       rows of W by heads; heads mix on their own
//!         y = norm(o) * gate     the mean square of o is that of all heads: a sum over ranks, one number a token
//!         sum over ranks of y W_o                                        columns of W_o by heads
//! unit    sum over ranks of (act(x W_1) * x W_2) W_3                     rows of W_1 and W_2, columns of W_3
//! ```
//!
//! Each sum is an all-reduce forward, and what enters a layer's maps one backward (Shoeybi et al., arXiv 1909.08053). Embedding,
//! head, norms of the stream and the narrow side of a gate are the same on all ranks. For TransNormerLLM and TNL, whose norm over
//! all heads is exact.

use candle_core::{Result, Tensor, bail};

use super::config::{Architecture, Config, OutputNorm};

/// What a rank has of a tensor that all ranks have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// Of each of so many maps above each other, a run of rows.
    Rows(usize),
    /// A run of columns.
    Columns,
}

impl Cut {
    /// The part `part` of `parts` of `tensor`, whose first `before` axes are not those of the weight.
    ///
    /// # Errors
    /// It does not split.
    pub fn part(self, tensor: &Tensor, before: usize, part: usize, parts: usize) -> Result<Tensor> {
        let (axis, maps) = match self {
            Self::Whole => return Ok(tensor.clone()),
            Self::Rows(maps) => (before, maps),
            Self::Columns => (before + 1, 1),
        };
        let size = tensor.dim(axis)?;
        if !size.is_multiple_of(maps * parts) {
            bail!("{:?} do not split into {parts} parts", tensor.dims());
        }
        let (map, own) = (size / maps, size / maps / parts);
        let rows: Vec<Tensor> = (0..maps)
            .map(|index| tensor.narrow(axis, index * map + part * own, own))
            .collect::<Result<_>>()?;
        Tensor::cat(&rows, axis)?.force_contiguous()
    }

    /// The tensor of which `parts` are the parts, in order.
    ///
    /// # Errors
    /// They do not fit together.
    pub fn whole(self, parts: &[Tensor], before: usize) -> Result<Tensor> {
        let (axis, maps) = match (self, parts) {
            (_, []) => bail!("no parts of a tensor"),
            (Self::Whole, [first, ..]) => return Ok(first.clone()),
            (Self::Rows(maps), _) => (before, maps),
            (Self::Columns, _) => (before + 1, 1),
        };
        let own = parts[0].dim(axis)? / maps;
        let mut rows = Vec::with_capacity(maps * parts.len());
        for map in 0..maps {
            for part in parts {
                rows.push(part.narrow(axis, map * own, own)?);
            }
        }
        Tensor::cat(&rows, axis)
    }
}

impl Config {
    /// What a rank has of the weights called `name`.
    pub fn cut_of(&self, name: &str) -> Cut {
        let Some((_, name)) = name
            .strip_prefix("model.layers.")
            .and_then(|name| name.split_once('.'))
        else {
            return Cut::Whole;
        };
        let Some((_, name)) = name.split_once('.') else {
            return Cut::Whole;
        };
        match name.strip_suffix(".weight").unwrap_or(name) {
            "q_proj" | "k_proj" | "v_proj" | "q_conv1d" | "k_conv1d" | "v_conv1d" | "g_proj.1" | "g_norm"
            | "lrpe.theta" | "gate_proj" | "up_proj" | "l1" | "l2" => Cut::Rows(1),
            "qkvu_proj" => Cut::Rows(4),
            "o_proj" | "out_proj" | "down_proj" | "l3" => Cut::Columns,
            _ => Cut::Whole,
        }
    }

    /// Refuses a model whose layers do not split over `ranks`, in words: what was found and what was expected.
    ///
    /// # Errors
    /// Why they do not.
    pub fn check_tensor(&self, ranks: usize) -> std::result::Result<(), String> {
        let expected = |found: String, expected: &str| {
            Err(format!(
                "{found}, expected {expected} with distributed.tensor = {ranks}"
            ))
        };
        if !matches!(self.architecture, Architecture::Tnl | Architecture::Transnormer) {
            return expected(
                format!("architecture is {}", self.architecture.name()),
                "tnl or transnormer",
            );
        }
        if !self.attn.is_empty() {
            return expected("some layers have softmax attention".to_owned(), "none");
        }
        if self.attention_bias || self.mlp_bias {
            return expected("maps have biases".to_owned(), "none");
        }
        if self.output_norm == OutputNorm::Layer && !self.norm_per_head {
            return expected("output_norm is layer".to_owned(), "rms, or norm_per_head");
        }
        for (name, count) in [
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
        ] {
            if !count.is_multiple_of(ranks) {
                return expected(format!("{name} is {count}"), "a multiple of the ranks");
            }
        }
        Ok(())
    }

    /// The shape of one of `ranks` parts of a layer: a layer of fewer heads, as wide outside.
    pub(super) fn of_tensor_part(&self, ranks: usize) -> Self {
        Self {
            num_attention_heads: self.num_attention_heads / ranks,
            intermediate_size: self.intermediate_size / ranks,
            head_dim: Some(self.head_width()),
            value_dim: Some(self.value_size() / ranks),
            gate_low_rank_dim: Some(self.gate_rank()),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn parts_are_put_together_again() -> Result<()> {
        let values: Vec<f32> = (0..2 * 24 * 4).map(|i| i as f32).collect();
        let tensor = Tensor::from_vec(values, (2, 24, 4), &Device::Cpu)?;
        for (cut, shape) in [
            (Cut::Whole, [2, 24, 4]),
            (Cut::Rows(1), [2, 12, 4]),
            (Cut::Rows(4), [2, 12, 4]),
            (Cut::Columns, [2, 24, 2]),
        ] {
            let parts = [0, 1].map(|part| cut.part(&tensor, 1, part, 2));
            let parts: Vec<Tensor> = parts.into_iter().collect::<Result<_>>()?;
            assert_eq!(parts[1].dims(), shape);
            let whole = cut.whole(&parts, 1)?;
            assert_eq!(
                whole.flatten_all()?.to_vec1::<f32>()?,
                tensor.flatten_all()?.to_vec1::<f32>()?
            );
        }
        // The second half of each of four maps of six rows.
        let second = Cut::Rows(4).part(&tensor, 1, 1, 2)?;
        let firsts: Vec<f32> = second.get(0)?.narrow(1, 0, 1)?.flatten_all()?.to_vec1()?;
        assert_eq!(
            firsts,
            [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23].map(|row| 4.0 * row as f32)
        );
        assert!(Cut::Rows(1).part(&tensor, 1, 0, 5).is_err());
        Ok(())
    }
}

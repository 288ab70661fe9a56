//! The formulas beside the table of the paper, and beside models all of whose products are counted, forward and backward.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{CpuStorage, CustomOp2, D, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::ops::{sigmoid, silu, softmax};
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::{LanguageModel, SoftmaxLayers};
use fulgur_lightnet::params::{Outline, Params};

use super::*;

fn config(architecture: Architecture, layers: usize, width: usize, heads: usize) -> Config {
    Config {
        vocab_size: 50,
        hidden_size: width,
        intermediate_size: width * 8 / 3,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        tie_word_embeddings: true,
        ..Config::of(architecture)
    }
}

fn account(config: &Config, context: usize) -> Account {
    let params = Outline::new();
    LanguageModel::new(config, DType::F32, &params.builder()).unwrap();
    Account::of(config, &params.shapes(), context)
}

/// Rows of the table: what N has besides 12 L d^2, over L d^2, and x.
#[test]
fn equals_the_table_of_the_paper() {
    let (layers, context) = (4, 1024);
    for (width, heads) in [(96, 1), (192, 3), (384, 6)] {
        let (d, h, n) = (width as f64, heads as f64, context as f64);
        let elements = 5.0 / (18.0 * d);
        for (architecture, more, x) in [
            (Architecture::Llama, 0.0, n / (6.0 * d)),
            (Architecture::Tnl, 2.0 / h, 1.0 / (2.0 * h)),
            (Architecture::Hgrn2, 0.0, 1.0 / (3.0 * h)),
            (Architecture::Cosformer2, 2.0 / h, 3.0 / (4.0 * h)),
        ] {
            let found = account(&config(architecture, layers, width, heads), context);
            let square = layers as f64 * d * d;
            assert_eq!(found.weights as f64, (12.0 + more) * square, "{architecture:?}");
            let flops = 72.0 * square * (1.0 + x + elements);
            assert!((found.flops / flops - 1.0).abs() < 1e-12, "{architecture:?}");
            assert_eq!(found.head, 50 * width as u64);
            assert!(found.parameters > found.weights + found.head);
        }
        // Softmax in every eighth layer of TNL.
        let mut hybrid = config(Architecture::Tnl, 16, width, heads);
        hybrid.attn = vec![SoftmaxLayers {
            layers: vec![7, 15],
            num_heads: heads,
            num_kv_heads: None,
            qkv_bias: false,
            window_size: None,
            rope_theta: 1e4,
        }];
        let (found, square) = (account(&hybrid, context), 16.0 * d * d);
        assert_eq!(found.weights as f64, (12.0 + 7.0 / (4.0 * h)) * square);
        let x = n / (48.0 * d) + 7.0 / (16.0 * h) + elements;
        assert!((found.flops / (72.0 * square * (1.0 + x)) - 1.0).abs() < 1e-12);
    }
}

/// TransNormerLLM has a gate of full rank, LightNet one of low rank.
#[test]
fn others_are_counted_whole() {
    let square = 2.0 * 96.0 * 96.0;
    let weights = |architecture| account(&config(architecture, 2, 96, 2), 64).weights as f64;
    assert_eq!(weights(Architecture::Transnormer), 13.0 * square);
    assert_eq!(weights(Architecture::Lightnet), 13.0 * square);
}

/// `a b` of `[B, M, K]` and `[B, K, N]`, which counts its operations and those of its gradients.
#[derive(Clone, Default)]
struct Product(Arc<AtomicU64>);

impl Product {
    fn of(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.contiguous()?.apply_op2(&b.contiguous()?, self.clone())
    }

    /// `x W^T` of `[N, d]`.
    fn map(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.of(&x.unsqueeze(0)?, &weight.t()?.unsqueeze(0)?)?.squeeze(0)
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "counted product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, m, k) = la.shape().dims3()?;
        let n = lb.shape().dims3()?.2;
        let (a, b) = (
            &a.as_slice::<f32>()?[la.start_offset()..],
            &b.as_slice::<f32>()?[lb.start_offset()..],
        );
        let mut out = vec![0f32; batch * m * n];
        for (i, row) in out.chunks_exact_mut(n).enumerate() {
            let b = &b[i / m * k * n..];
            for (j, a) in a[i * k..][..k].iter().enumerate() {
                for (out, b) in row.iter_mut().zip(&b[j * n..]) {
                    *out += a * b;
                }
            }
        }
        self.0
            .fetch_add((2 * batch * m * k * n) as u64, Ordering::Relaxed);
        Ok((CpuStorage::F32(out), (batch, m, n).into()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let da = self.of(grad, &b.t()?)?;
        let db = self.of(&a.t()?, grad)?;
        Ok((Some(da), Some(db)))
    }
}

/// A model by its formulas, one sequence at a time, with every product of its layers counted.
struct Counting {
    config: Config,
    params: BTreeMap<String, Var>,
    product: Product,
}

impl Counting {
    fn weight(&self, layer: usize, name: &str) -> &Tensor {
        &self.params[&format!("model.layers.{layer}.{name}.weight")]
    }

    fn map(&self, x: &Tensor, layer: usize, name: &str) -> Result<Tensor> {
        self.product.map(x, self.weight(layer, name))
    }

    fn norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean + self.config.rms_norm_eps)?.sqrt()?)?
            .broadcast_mul(gain)
    }

    /// `[N, d]` to `[H, N, D]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (n, heads) = (x.dim(0)?, self.config.num_attention_heads);
        x.reshape((n, heads, ()))?.transpose(0, 1)?.contiguous()
    }

    fn joined(&self, o: &Tensor) -> Result<Tensor> {
        let n = o.dim(1)?;
        o.transpose(0, 1)?.contiguous()?.reshape((n, ()))
    }

    /// Logits `[N, V]` of embedded tokens `[N, d]`; the head's product does not count.
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let llama = self.config.architecture == Architecture::Llama;
        let [mixer_norm, glu_norm] = match llama {
            true => ["input_layernorm", "post_attention_layernorm"],
            false => ["attn_norm", "mlp_norm"],
        };
        let mut x = x.clone();
        for layer in 0..self.config.num_hidden_layers {
            let normed = self.norm(&x, self.weight(layer, mixer_norm))?;
            let mixed = match self.config.architecture {
                Architecture::Llama => self.attention(&normed, layer)?,
                _ => self.recurrence(&normed, layer)?,
            };
            x = (x + mixed)?;
            let normed = self.norm(&x, self.weight(layer, glu_norm))?;
            let gate = silu(&self.map(&normed, layer, "mlp.gate_proj")?)?;
            let hidden = (gate * self.map(&normed, layer, "mlp.up_proj")?)?;
            x = (x + self.map(&hidden, layer, "mlp.down_proj")?)?;
        }
        let x = self.norm(&x, &self.params["model.norm.weight"])?;
        let embedding = if llama { "embed_tokens" } else { "embeddings" };
        x.matmul(&self.params[&format!("model.{embedding}.weight")].t()?)
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let (n, width) = (x.dim(0)?, self.config.head_width());
        let [q, k, v] = ["q", "k", "v"].map(|letter| {
            let x = self.map(x, layer, &format!("self_attn.{letter}_proj"))?;
            self.heads(&x)
        });
        let half = width / 2;
        let angles: Vec<f32> = (0..n * half)
            .map(|i| (i / half) as f32 * 1e4f32.powf(-2.0 * (i % half) as f32 / width as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (n, half), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let turn = |x: Tensor| -> Result<Tensor> {
            let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            Tensor::cat(&[low, high], 2)
        };
        let (q, k) = (turn(q?)?, turn(k?)?);
        let scores = (self.product.of(&q, &k.transpose(1, 2)?)? / (width as f64).sqrt())?;
        let future: Vec<f32> = (0..n * n)
            .map(|i| if i % n > i / n { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(future, (n, n), &Device::Cpu)?)?;
        let o = self.product.of(&softmax(&scores, D::Minus1)?, &v?)?;
        self.map(&self.joined(&o)?, layer, "self_attn.o_proj")
    }

    /// Lightning attention in blocks as long as heads are wide: all pairs of a block, and the state between blocks.
    fn recurrence(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let map = |letter: &str| self.map(x, layer, &format!("attn.{letter}_proj"));
        let [q, k, v, log] = match self.config.architecture {
            Architecture::Hgrn2 => {
                let f = map("f")?;
                let bound = layer as f64 / self.config.num_hidden_layers as f64;
                let log = ((sigmoid(&f)? * (1.0 - bound))? + bound)?.log()?;
                [
                    silu(&map("q")?)?,
                    (sigmoid(&f.neg()?)? * (1.0 - bound))?,
                    map("i")?,
                    log,
                ]
            }
            Architecture::Tnl => {
                let q = silu(&map("q")?)?;
                let (heads, layers) = (self.config.num_attention_heads, self.config.num_hidden_layers);
                let factor = 1.0 - layer as f64 / (layers - 1) as f64 + 1e-5;
                let width = self.config.head_width();
                let rates: Vec<f32> = (0..heads * width)
                    .map(|i| -(((-8.0 * (i / width + 1) as f64 / heads as f64).exp2() * factor) as f32))
                    .collect();
                let log = Tensor::from_vec(rates, heads * width, &Device::Cpu)?.broadcast_as(q.shape())?;
                [q, silu(&map("k")?)?, silu(&map("v")?)?, log]
            }
            _ => {
                let q = silu(&map("q")?)?;
                let log = q.zeros_like()?;
                [q, silu(&map("k")?)?, map("v")?, log]
            }
        };
        let [mut q, mut k, v, mut log] = [q, k, v, log].map(|x| self.heads(&x).unwrap());
        if self.config.architecture == Architecture::Cosformer2 {
            (q, k) = (self.doubled(&q)?, self.doubled(&k)?);
            log = q.zeros_like()?;
        }
        let (heads, n, keys) = q.dims3()?;
        let width = self.config.head_width();
        let past: Vec<f32> = (0..width * width)
            .map(|i| if i % width > i / width { 0.0 } else { 1.0 })
            .collect();
        let past = Tensor::from_vec(past, (width, width), &Device::Cpu)?;
        let mut state = Tensor::zeros((heads, keys, width), DType::F32, &Device::Cpu)?;
        let mut blocks = Vec::new();
        for start in (0..n).step_by(width) {
            let [q, k, v, log] = [&q, &k, &v, &log].map(|x| x.narrow(1, start, width).unwrap());
            let so_far = log.cumsum(1)?;
            let all = so_far.narrow(1, width - 1, 1)?;
            let q = (q * so_far.exp()?)?;
            let inside = (&k * so_far.neg()?.exp()?)?;
            let scores = self
                .product
                .of(&q, &inside.transpose(1, 2)?)?
                .broadcast_mul(&past)?;
            let o = (self.product.of(&scores, &v)? + self.product.of(&q, &state)?)?;
            let later = (k * all.broadcast_sub(&so_far)?.exp()?)?;
            let kept = state.broadcast_mul(&all.exp()?.transpose(1, 2)?)?;
            state = (kept + self.product.of(&later.transpose(1, 2)?, &v)?)?;
            blocks.push(o);
        }
        let o = self.norm(
            &self.joined(&Tensor::cat(&blocks, 1)?)?,
            self.weight(layer, "attn.g_norm"),
        )?;
        let o = match self.config.architecture {
            Architecture::Hgrn2 => o,
            _ => {
                let gate = self.map(&self.map(x, layer, "attn.g_proj.0")?, layer, "attn.g_proj.1")?;
                (o * sigmoid(&gate)?)?
            }
        };
        self.map(&o, layer, "attn.o_proj")
    }

    /// All channels with their cosines and sines, the slower half with an angle of zero.
    fn doubled(&self, x: &Tensor) -> Result<Tensor> {
        let (_, n, width) = x.dims3()?;
        let angle = |i: usize| match i % width {
            j if j < width / 2 => (i / width) as f32 * 1e4f32.powf(-2.0 * j as f32 / width as f32),
            _ => 0.0,
        };
        let angles = Tensor::from_vec((0..n * width).map(angle).collect(), (n, width), &Device::Cpu)?;
        Tensor::cat(
            &[x.broadcast_mul(&angles.cos()?)?, x.broadcast_mul(&angles.sin()?)?],
            2,
        )
    }
}

/// Every product of whole models is counted while it runs, forward and backward; they compute what the models compute, and the
/// formulas are 1 % from the count at most, of which the work on elements is a half.
#[test]
fn equals_counted_products() {
    const TOKENS: usize = 512;
    for architecture in [
        Architecture::Llama,
        Architecture::Tnl,
        Architecture::Hgrn2,
        Architecture::Cosformer2,
    ] {
        let config = Config {
            intermediate_size: 171,
            use_tpe: false,
            ..config(architecture, 2, 64, 2)
        };
        let params = Params::random(4, &Device::Cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder()).unwrap();
        let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * i % 47).collect();
        let expected = model
            .logits(&Ids::new(&ids, &[1, TOKENS], config.vocab_size).unwrap())
            .unwrap()
            .squeeze(0)
            .unwrap();
        let counting = Counting {
            config: config.clone(),
            params: params.vars(),
            product: Product::default(),
        };
        let embedding = match architecture {
            Architecture::Llama => "model.embed_tokens.weight",
            _ => "model.embeddings.weight",
        };
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        let x = counting.params[embedding].index_select(&ids, 0).unwrap();
        let logits = counting.logits(&x).unwrap();
        let far = (&logits - &expected).unwrap().abs().unwrap().max_all().unwrap();
        let scale = expected
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        let far = far.to_scalar::<f32>().unwrap();
        assert!(far < 2e-4 * scale, "{architecture:?}: {far} of {scale}");
        logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let counted = counting.product.0.load(Ordering::Relaxed) as f64;
        let formula = account(&config, TOKENS).flops * TOKENS as f64;
        assert!(
            (formula / counted - 1.0).abs() < 0.01,
            "{architecture:?}: {formula} by the formula, {counted} counted"
        );
    }
}

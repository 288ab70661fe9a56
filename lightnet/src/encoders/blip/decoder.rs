//! The decoder of texts: a BERT whose tokens see those before them and a picture.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::Sizes;
use super::search::Scores;
use crate::encoders::gelu::Gelu;
use crate::encoders::transformer::{Map, Meeting, Norm, attend, join, small};

/// Keys and values `[B, L, H, D]`.
type Pair = (Tensor, Tensor);

/// One attention with its norm behind it.
#[derive(Clone, Debug)]
struct Attention {
    query: Map,
    key: Map,
    value: Map,
    out: Map,
    norm: Norm,
    heads: usize,
}

impl Attention {
    /// Of a stream over vectors of width `seen`.
    fn new(sizes: &Sizes, seen: usize, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let (width, own) = (sizes.text.width, vb.pp("self"));
        Ok(Self {
            query: Map::new(width, width, true, compute, &own.pp("query"))?,
            key: Map::new(seen, width, true, compute, &own.pp("key"))?,
            value: Map::new(seen, width, true, compute, &own.pp("value"))?,
            out: Map::new(width, width, true, compute, &vb.pp("output.dense"))?,
            norm: Norm::new(width, sizes.text.eps, &vb.pp("output.LayerNorm"))?,
            heads: sizes.text.heads,
        })
    }

    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        x.reshape((batch, tokens, self.heads, width / self.heads))
    }

    /// What is attended to, of vectors `[B, L, seen]` in the type of products.
    fn keys(&self, seen: &Tensor) -> Result<Pair> {
        let key = self.split(&self.key.forward(seen)?)?;
        Ok((key, self.split(&self.value.forward(seen)?)?))
    }

    /// The f32 stream behind the attention; `seen` is the stream in the type of products.
    fn forward(&self, stream: &Tensor, own: &Tensor, keys: &Pair, meeting: &Meeting<'_>) -> Result<Tensor> {
        let query = self.split(&self.query.forward(own)?)?;
        let mixed = attend(&query, &keys.0, &keys.1, meeting)?.reshape(stream.dims())?;
        self.norm.forward(&join(stream, &mixed, &self.out)?, DType::F32)
    }
}

#[derive(Clone, Debug)]
struct Layer {
    text: Attention,
    picture: Attention,
    inner: Map,
    outer: Map,
    norm: Norm,
}

/// What is known of the texts so far: keys and values of their tokens, and those of their picture.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Of each layer.
    text: Vec<Option<Pair>>,
    picture: Vec<Pair>,
    tokens: usize,
}

impl Cache {
    /// Tokens that were read.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Texts that go on from rows `parents` of those that are there.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn follow(&mut self, parents: &[usize]) -> Result<()> {
        for pair in self.text.iter_mut().flatten() {
            let rows: Vec<u32> = parents.iter().map(|&row| row as u32).collect();
            let rows = Tensor::new(rows, pair.0.device())?;
            *pair = (pair.0.index_select(&rows, 0)?, pair.1.index_select(&rows, 0)?);
        }
        Ok(())
    }
}

/// The network.
#[derive(Clone, Debug)]
pub struct Decoder {
    words: Tensor,
    positions: Tensor,
    first: Norm,
    layers: Vec<Layer>,
    gelu: Gelu,
    transform: Map,
    transformed: Norm,
    scores: Map,
    compute: DType,
}

impl Decoder {
    /// Takes the tensors below `text_decoder`.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    pub(super) fn new(sizes: &Sizes, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let (width, hidden, eps) = (sizes.text.width, sizes.text.hidden, sizes.text.eps);
        let embeddings = vb.pp("bert.embeddings");
        let layer = |i: usize| {
            let vb = vb.pp(format!("bert.encoder.layer.{i}"));
            Ok(Layer {
                text: Attention::new(sizes, width, compute, &vb.pp("attention"))?,
                picture: Attention::new(sizes, sizes.vision.width, compute, &vb.pp("crossattention"))?,
                inner: Map::new(width, hidden, true, compute, &vb.pp("intermediate.dense"))?,
                outer: Map::new(hidden, width, true, compute, &vb.pp("output.dense"))?,
                norm: Norm::new(width, eps, &vb.pp("output.LayerNorm"))?,
            })
        };
        let words = small((sizes.vocabulary, width), "word_embeddings.weight", &embeddings)?;
        let predictions = vb.pp("cls.predictions");
        let table = match sizes.tied {
            true => words.clone(),
            false => small((sizes.vocabulary, width), "decoder.weight", &predictions)?,
        };
        let bias = match sizes.bias_of_decoder {
            true => "decoder.bias",
            false => "bias",
        };
        let bias = small(sizes.vocabulary, bias, &predictions)?;
        Ok(Self {
            positions: small((sizes.longest, width), "position_embeddings.weight", &embeddings)?,
            first: Norm::new(width, eps, &embeddings.pp("LayerNorm"))?,
            layers: (0..sizes.text.layers).map(layer).collect::<Result<_>>()?,
            gelu: sizes.text.gelu,
            transform: Map::new(width, width, true, compute, &predictions.pp("transform.dense"))?,
            transformed: Norm::new(width, eps, &predictions.pp("transform.LayerNorm"))?,
            scores: Map::of(&table, compute)?.with_bias(bias),
            words,
            compute,
        })
    }

    /// A text of no tokens beside the states `[B, P, d_v]` of pictures. Several texts may follow beside one picture.
    ///
    /// # Errors
    /// States of another width.
    pub fn begin(&self, states: &Tensor) -> Result<Cache> {
        let states = states.to_dtype(self.compute)?;
        Ok(Cache {
            text: vec![None; self.layers.len()],
            picture: self
                .layers
                .iter()
                .map(|layer| layer.picture.keys(&states))
                .collect::<Result<_>>()?,
            tokens: 0,
        })
    }

    /// Scores `[B, N, V]` in f32 behind each of the next tokens `input_ids` `[B, N]`; `attention_mask` `[B, N]`, zero on padding, only
    /// for texts that begin.
    ///
    /// # Errors
    /// Texts that are too long, ids outside the vocabulary, or shapes that do not fit.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        let (batch, tokens) = input_ids.dims2()?;
        let (vocabulary, width) = self.words.dims2()?;
        let longest = self.positions.dim(0)?;
        if batch == 0 || tokens == 0 || cache.tokens + tokens > longest {
            candle_core::bail!(
                "input_ids of [{batch}, {tokens}] behind {} tokens, expected 1 to {longest} in all",
                cache.tokens
            );
        }
        if attention_mask.is_some() && cache.tokens > 0 {
            candle_core::bail!(
                "attention_mask behind {} tokens, expected one of whole texts",
                cache.tokens
            );
        }
        let ids = input_ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let ids: Option<Vec<u32>> = ids.into_iter().map(|id| u32::try_from(id).ok()).collect();
        let Some(ids) = ids.filter(|ids| ids.iter().all(|&id| (id as usize) < vocabulary)) else {
            candle_core::bail!("input_ids, expected ids from 0 to below {vocabulary}");
        };
        let ids = Tensor::new(ids, self.words.device())?;
        let words = self
            .words
            .index_select(&ids, 0)?
            .reshape((batch, tokens, width))?;
        let stream = words.broadcast_add(&self.positions.narrow(0, cache.tokens, tokens)?)?;
        let mut stream = self.first.forward(&stream, DType::F32)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let own = stream.to_dtype(self.compute)?;
            let mut keys = layer.text.keys(&own)?;
            if let Some(before) = &cache.text[i] {
                keys = (
                    Tensor::cat(&[&before.0, &keys.0], 1)?,
                    Tensor::cat(&[&before.1, &keys.1], 1)?,
                );
            }
            let past = Meeting {
                causal: true,
                mask: attention_mask,
            };
            stream = layer.text.forward(&stream, &own, &keys, &past)?;
            cache.text[i] = Some(keys);
            let whole = Meeting {
                causal: false,
                mask: None,
            };
            let picture = spread(&cache.picture[i], batch)?;
            let own = stream.to_dtype(self.compute)?;
            stream = layer.picture.forward(&stream, &own, &picture, &whole)?;
            let inner = self
                .gelu
                .apply(&layer.inner.forward(&stream.to_dtype(self.compute)?)?)?;
            stream = layer
                .norm
                .forward(&join(&stream, &inner, &layer.outer)?, DType::F32)?;
        }
        cache.tokens += tokens;
        let last = self
            .gelu
            .apply(&self.transform.forward(&stream.to_dtype(self.compute)?)?)?;
        let last = self
            .transformed
            .forward(&last.to_dtype(DType::F32)?, self.compute)?;
        self.scores.forward(&last)?.to_dtype(DType::F32)
    }

    /// Where the network lies.
    fn device(&self) -> &Device {
        self.words.device()
    }
}

/// The keys of one picture for each of several texts.
fn spread(pair: &Pair, batch: usize) -> Result<Pair> {
    let one = |x: &Tensor| {
        let (pictures, length, heads, width) = x.dims4()?;
        match pictures {
            1 if batch > 1 => x.broadcast_as((batch, length, heads, width)),
            _ => Ok(x.clone()),
        }
    };
    Ok((one(&pair.0)?, one(&pair.1)?))
}

/// The decoder beside one picture, as a search asks it.
pub(super) struct Next<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) cache: Cache,
    pub(super) prompt: &'a [u32],
}

impl Next<'_> {
    fn scores(&mut self, tokens: &[u32], rows: usize) -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::from_slice(tokens, (rows, tokens.len() / rows), self.decoder.device())?;
        let scores = self.decoder.forward(&ids, None, &mut self.cache)?;
        let last = scores.dim(1)? - 1;
        scores.narrow(1, last, 1)?.squeeze(1)?.to_vec2()
    }
}

impl Scores for Next<'_> {
    fn first(&mut self) -> Result<Vec<f32>> {
        if self.prompt.is_empty() {
            candle_core::bail!("a prompt of 0 tokens, expected at least the first");
        }
        Ok(self.scores(self.prompt, 1)?.swap_remove(0))
    }

    fn next(&mut self, parents: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        if parents.len() > 1 || parents != [0] {
            self.cache.follow(parents)?;
        }
        self.scores(tokens, tokens.len())
    }
}

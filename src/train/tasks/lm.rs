//! Task `lm`: the next token of a text, or tokens of it that were masked.

mod masking;
mod packing;
mod shares;
#[cfg(test)]
mod tests;

pub(super) mod flops;
pub(super) mod shape;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::text::Documents;
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::exchange::StateExchange;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::{Cut, LanguageModel};
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::export::write_part;
use crate::device::compute_dtype;
use crate::distributed::{Ranks, Share};
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};
use masking::{IGNORED, mask};
use packing::Packed;
use shape::ModelOptions;

/// Largest file of tokens that is read.
const MOST_BYTES: u64 = 8 << 30;
/// Most tokens of a batch: beyond all reason, and ids still fit into memory.
const MOST_TOKENS: usize = 1 << 28;
/// Rows of logits that a GPU holds at a time: more re-read the weight's gradient less often.
const ROWS_ON_GPU: usize = 4096;

/// In which order windows of the text come.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Order {
    /// Every window once an epoch, in an order of its own.
    Shuffled,
    /// One after the other, and from the front again.
    Sequential,
}

/// What windows do where a document ends in them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Packing {
    /// Tokens see those of the documents before.
    Stream,
    /// Each document begins with nothing: states are reset, and no token is to foretell the next document.
    Documents,
}

/// The token behind each document of JSONL, which no text holds.
const END: u16 = 0;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// A text, a byte a token; if its name ends in `.jsonl`, documents `{"text": "..."}`, a line each, whose bytes end with a 0;
    /// or, if it ends in `.u16`, token ids of two bytes, the lower one first.
    pub tokens: PathBuf,
    /// What windows do where a document ends.
    pub packing: Packing,
    /// The token that ends a document; of JSONL it is 0.
    pub end_of_document: Option<u16>,
    /// Part of the tokens, at the end, that is held out for validation.
    pub held_out: f64,
    /// A file of the same kind that is held out instead, whole.
    pub held_out_tokens: Option<PathBuf>,
    /// Windows in a batch.
    pub batch: usize,
    /// Tokens in a window.
    pub context: usize,
    /// Order of the windows.
    pub order: Order,
    /// Windows of a validation.
    pub validation: usize,
    /// Of a model in both directions, the share of tokens that it has to restore.
    pub masked: f64,
    /// Run each layer again in the backward pass instead of keeping what it made: less memory, more time.
    pub recompute: bool,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tokens: PathBuf::new(),
            packing: Packing::Stream,
            end_of_document: None,
            held_out: 0.01,
            held_out_tokens: None,
            batch: 16,
            context: 256,
            order: Order::Shuffled,
            validation: 64,
            masked: 0.15,
            recompute: false,
            model: ModelOptions::default(),
        }
    }
}

/// The task.
pub(super) struct LmTask {
    options: Options,
    tokens: Arc<Vec<u16>>,
    /// Tokens that are trained on; the rest is held out.
    trained: usize,
    /// The token that ends a document, where windows are packed by documents.
    end: Option<u16>,
    params: Params,
    model: LanguageModel,
    /// The part of batches that this rank takes.
    share: Share,
    /// The model of a part of sequences, where ranks share them.
    part: Option<LanguageModel>,
}

impl LmTask {
    /// Builds the network and reads the tokens.
    ///
    /// # Errors
    /// A file that is no tokens of this vocabulary, too short for a window, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        options.model.check()?;
        let config = options.model.config();
        let path = options.tokens.display();
        if options.batch == 0 || options.context == 0 {
            let (batch, context) = (options.batch, options.context);
            return Err(format!("[lm]: batch {batch}, context {context}: expected both above 0").into());
        }
        if options
            .batch
            .checked_mul(options.context)
            .is_none_or(|tokens| tokens > MOST_TOKENS)
        {
            let (batch, context) = (options.batch, options.context);
            return Err(format!(
                "[lm]: batch {batch}, context {context}: expected at most {MOST_TOKENS} tokens in a batch"
            )
            .into());
        }
        if !(0.0..1.0).contains(&options.held_out) {
            return Err(format!("[lm]: held_out is {}, expected 0 to 1", options.held_out).into());
        }
        let masked = config.bidirectional.then_some(options.masked);
        if masked.is_some_and(|share| !(share > 0.0 && share < 1.0)) {
            return Err(format!("[lm]: masked is {}, expected above 0 and below 1", options.masked).into());
        }
        let end = end_of_documents(&options)?;
        // The last row is that of the mask, where there is one.
        let rows = config.vocab_size - usize::from(config.bidirectional);
        let mut tokens = read_tokens_below(&options.tokens, rows)?;
        let held_out = match &options.held_out_tokens {
            Some(path) => {
                let others = read_tokens_below(path, rows)?;
                tokens.extend_from_slice(&others);
                others.len()
            }
            None => (tokens.len() as f64 * options.held_out) as usize,
        };
        let trained = tokens.len() - held_out;
        let least = options.context + 1;
        let judged = options.held_out > 0.0 || options.held_out_tokens.is_some();
        if trained < least || (judged && held_out < least) {
            return Err(format!(
                "{path}: {trained} tokens to train on and {held_out} held out, expected {least} of each, a window of {} and \
                 its targets",
                options.context
            )
            .into());
        }
        let params = Params::random(seed, device);
        let model = LanguageModel::new(&config, compute_dtype(device), &params.builder())?;
        let model = model.recomputed(options.recompute);
        if end.is_some() {
            packing::check(&model, device)?;
        }
        Ok(Self {
            end,
            options,
            tokens: Arc::new(tokens),
            trained,
            params,
            model,
            share: Share::WHOLE,
            part: None,
        })
    }

    /// Where the windows of a batch begin.
    fn starts(&self, cursor: &Cursor) -> Vec<usize> {
        let Options { batch, context, .. } = self.options;
        match self.options.order {
            Order::Shuffled => {
                let windows = (self.trained - 1) / context;
                let chosen = cursor.shuffled(windows, batch);
                chosen.into_iter().map(|window| window * context).collect()
            }
            Order::Sequential => {
                let places = (self.trained - context - 1).max(1);
                (0..batch)
                    .map(|i| (cursor.index as usize * batch + i) * context % places)
                    .collect()
            }
        }
    }

    /// Ids `[B, N]` of the windows that begin there, and the tokens after each of them.
    fn windows(&self, starts: &[usize]) -> TaskResult<[Tensor; 2]> {
        let context = self.options.context;
        let gather = |shift: usize| {
            let ids: Vec<u32> = starts
                .iter()
                .flat_map(|start| &self.tokens[start + shift..][..context])
                .map(|&id| u32::from(id))
                .collect();
            Tensor::from_vec(ids, (starts.len(), context), &Device::Cpu)
        };
        Ok([gather(0)?, gather(1)?])
    }

    /// Windows as [`Self::windows`]; of a model in both directions, masked, with the masked tokens as targets.
    fn examples(&self, starts: &[usize], noise: impl FnOnce() -> Philox) -> TaskResult<[Tensor; 2]> {
        let [ids, targets] = self.windows(starts)?;
        let config = self.model.config();
        if !config.bidirectional {
            return Ok([ids, targets]);
        }
        Ok(mask(&ids, config.vocab_size, self.options.masked, &mut noise())?)
    }

    fn head(&self) -> cross_entropy::Options<'static> {
        cross_entropy::Options {
            ignore: (self.model.config().bidirectional || self.end.is_some()).then_some(IGNORED),
            chunk: self.params.device().is_cuda().then_some(ROWS_ON_GPU),
            ..Default::default()
        }
    }

    /// Leaves of the model what one of the ranks that `others` joins has of its layers. Gives what it has of each parameter.
    fn split(&mut self, others: &Arc<dyn StateExchange>) -> TaskResult<BTreeMap<String, Cut>> {
        let config = self.model.config().clone();
        config.check_tensor(others.parts())?;
        let (mut own, mut cuts) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in self.params.values() {
            let cut = config.cut_of(&name);
            own.insert(name.clone(), cut.part(&value, 0, others.part(), others.parts())?);
            cuts.insert(name, cut);
        }
        self.params = Params::of(&own, self.params.device())?;
        let vb = self.params.builder();
        let model = LanguageModel::in_tensor_part(&config, self.model.compute(), &vb, others)?;
        self.model = model.recomputed(self.options.recompute);
        Ok(cuts)
    }

    fn ids(&self, ids: &Tensor) -> TaskResult<Ids> {
        Ok(Ids::of(ids, self.model.config().vocab_size)?)
    }
}

impl Task for LmTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "tokens"
    }

    fn flops_per_sample(&self) -> Option<f64> {
        let shapes = self.params.vars().into_iter();
        let shapes = shapes.map(|(name, var)| (name, var.dims().to_vec()));
        let operations = flops::per_token(self.model.config(), &shapes.collect(), self.options.context);
        Some(operations.all())
    }

    fn repeats(&self) -> bool {
        // Documents end elsewhere in every batch, and what other ranks say is not recorded.
        self.end.is_none() && self.part.is_none()
    }

    fn distribute(&mut self, ranks: &Ranks) -> TaskResult<()> {
        let share = ranks.share();
        let Options { batch, context, .. } = self.options;
        let wrong = |reason: String| format!("[lm]: {reason}");
        share.rows(batch).map_err(wrong)?;
        let tokens = share.tokens(context).map_err(wrong)?;
        if let Some(others) = ranks.tensor_exchange() {
            ranks.set_slices(self.split(&others).map_err(|e| wrong(e.to_string()))?);
        }
        let vars = self.params.vars().into_iter();
        let units = vars.map(|(name, var)| (var, self.model.config().unit_of(&name)));
        if let Some(parameters) = ranks.share_parameters(units) {
            self.model = self.model.clone().lent_by(parameters.clone());
        }
        self.part = ranks
            .exchange(match self.end {
                // Windows lie behind each other, and ranks take a piece of the line.
                Some(_) => tokens.len() * batch / share.groups,
                None => tokens.len(),
            })
            .map(|exchange| self.model.clone().in_parts(exchange));
        self.share = share;
        Ok(())
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let [ids, targets] = self.examples(&self.starts(cursor), || cursor.noise("mask"))?;
        if self.share != Share::WHOLE {
            return shares::of(self, &ids, &targets);
        }
        let tokens = ids.elem_count();
        if let Some(end) = self.end {
            let Packed {
                ids,
                targets,
                borders,
            } = Packed::of(&ids, &targets, end)?;
            let borders: Vec<u32> = borders.into_iter().map(|border| border as u32).collect();
            let borders = Tensor::new(borders, &Device::Cpu)?;
            let batch = Batch::new(tokens).with_ids("ids", self.ids(&ids)?);
            return Ok(batch.with("targets", targets).on_host("borders", borders));
        }
        Ok(Batch::new(tokens)
            .with_ids("ids", self.ids(&ids)?)
            .with("targets", targets))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let ids = batch.ids("ids")?;
        let targets = batch.get("targets")?;
        let model = self.part.as_ref().unwrap_or(&self.model);
        if self.end.is_some() {
            let borders = batch.get("borders")?.to_vec1::<u32>()?;
            let borders: Vec<usize> = borders.into_iter().map(|border| border as usize).collect();
            return Ok(model.packed_loss(ids, targets, &borders, &self.head())?.into());
        }
        Ok(model.loss(ids, targets, &self.head())?.into())
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let Options {
            batch,
            context,
            validation,
            ..
        } = self.options;
        let windows = (self.tokens.len() - self.trained).saturating_sub(1) / context;
        let starts: Vec<usize> = (0..windows.min(validation))
            .map(|window| self.trained + window * context)
            .collect();
        let (mut sum, mut count) = (0.0, 0);
        for starts in starts.chunks(batch) {
            // The same tokens are masked in every validation.
            let noise = || Philox::named(0, &format!("validation/mask/{}", starts[0]));
            let [mut ids, mut targets] = self.examples(starts, noise)?;
            let mut borders = None;
            if let Some(end) = self.end {
                let packed = Packed::of(&ids, &targets, end)?;
                (ids, targets, borders) = (packed.ids, packed.targets, Some(packed.borders));
            }
            let counted = targets.flatten_all()?.to_vec1::<u32>()?;
            let targets = targets.to_device(self.params.device())?;
            let (ids, head) = (self.ids(&ids)?, self.head());
            let losses = match &borders {
                Some(borders) => self.model.packed_losses(&ids, &targets, borders, &head)?,
                None => self.model.losses(&ids, &targets, &head)?,
            };
            let losses: Vec<f32> = losses.to_dtype(DType::F32)?.to_vec1()?;
            sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            count += counted.iter().filter(|&&target| target != IGNORED).count();
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let loss = sum / count as f64;
        Ok(vec![("loss".into(), loss), ("perplexity".into(), loss.exp())])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, self.model.config(), &self.params, None, Precision::F32)
    }
}

/// Whether the name of a file ends like this.
fn ends_in(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|extension| extension == ending)
}

/// The token that ends documents, where they are packed.
fn end_of_documents(options: &Options) -> TaskResult<Option<u16>> {
    let lines = ends_in(&options.tokens, "jsonl");
    if lines && options.end_of_document.is_some_and(|end| end != END) {
        return Err("[lm]: end_of_document is for other files than JSONL, whose documents end with 0".into());
    }
    if options.packing == Packing::Stream {
        return Ok(None);
    }
    let end = options.end_of_document.or(lines.then_some(END));
    end.map(Some).ok_or_else(|| {
        "[lm]: packing is documents, expected JSONL or end_of_document, the token that ends one".into()
    })
}

/// The bytes of the documents of a file, each with its end.
fn read_documents(path: &Path) -> TaskResult<Vec<u16>> {
    let mut tokens = Vec::new();
    for (index, text) in Documents::open(path)?.enumerate() {
        let text = text?;
        let name = path.display();
        if text.contains('\0') {
            return Err(format!("{name}: document {index} has a character 0, which ends documents").into());
        }
        if text.is_empty() {
            continue;
        }
        tokens.extend(text.bytes().map(u16::from));
        tokens.push(END);
        if tokens.len() as u64 > MOST_BYTES {
            return Err(format!("{name}: more than {MOST_BYTES} bytes, expected at most that").into());
        }
    }
    Ok(tokens)
}

/// As [`read_tokens`], all of them below `rows`.
fn read_tokens_below(path: &Path, rows: usize) -> TaskResult<Vec<u16>> {
    let tokens = read_tokens(path)?;
    match tokens.iter().position(|&id| usize::from(id) >= rows) {
        None => Ok(tokens),
        Some(at) => {
            let (name, id) = (path.display(), tokens[at]);
            Err(format!("{name}: token {at} is {id}, expected less than {rows}, the vocabulary").into())
        }
    }
}

/// The tokens of a file: bytes, of text or of documents, or ids of two bytes where its name ends in `.u16`.
fn read_tokens(path: &Path) -> TaskResult<Vec<u16>> {
    let name = path.display();
    if path.as_os_str().is_empty() {
        return Err(
            "[lm]: tokens is missing, expected a file of text, of documents (.jsonl) or of token ids (.u16)"
                .into(),
        );
    }
    if ends_in(path, "jsonl") {
        return read_documents(path);
    }
    let file = File::open(path).map_err(|e| format!("{name}: {e}"))?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("{name}: {e}"))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(format!("{name}: more than {MOST_BYTES} bytes, expected at most that").into());
    }
    if ends_in(path, "u16") {
        if bytes.len() % 2 == 1 {
            return Err(format!("{name}: {} bytes, expected two a token", bytes.len()).into());
        }
        let ids = bytes
            .chunks_exact(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        return Ok(ids.collect());
    }
    Ok(bytes.into_iter().map(u16::from).collect())
}

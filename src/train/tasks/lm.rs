//! Task `lm`: the next token of a text, or tokens of it that were masked.

mod masking;
mod packing;

pub(super) mod flops;
pub(super) mod shape;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::text::Documents;
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::LanguageModel;
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::export::{compute_dtype, write_part};
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

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let [ids, targets] = self.examples(&self.starts(cursor), || cursor.noise("mask"))?;
        let tokens = ids.elem_count();
        // The order of ids is found on the host, so that is where they stay.
        if let Some(end) = self.end {
            let Packed {
                ids,
                targets,
                borders,
            } = Packed::of(&ids, &targets, end)?;
            let borders: Vec<u32> = borders.into_iter().map(|border| border as u32).collect();
            let borders = Tensor::new(borders, &Device::Cpu)?;
            let batch = Batch::new(tokens).on_host("ids", ids).with("targets", targets);
            return Ok(batch.on_host("borders", borders));
        }
        Ok(Batch::new(tokens).on_host("ids", ids).with("targets", targets))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let ids = self.ids(batch.get("ids")?)?;
        let targets = batch.get("targets")?;
        if self.end.is_some() {
            let borders = batch.get("borders")?.to_vec1::<u32>()?;
            let borders: Vec<usize> = borders.into_iter().map(|border| border as usize).collect();
            return Ok(self
                .model
                .packed_loss(&ids, targets, &borders, &self.head())?
                .into());
        }
        Ok(self.model.loss(&ids, targets, &self.head())?.into())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Options as RunOptions, Recipe, run};
    use fulgur_lightnet::lm::{Architecture, Config};
    use serde_json::Value;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

    /// What is estimated beforehand is what is built.
    #[test]
    fn its_outline_has_its_parameters() {
        for architecture in Architecture::ALL.map(Architecture::name) {
            let folder = tempfile::tempdir().unwrap();
            let tokens = folder.path().join("text.txt");
            std::fs::write(&tokens, "words and words ".repeat(40)).unwrap();
            let recipe = format!(
                "task = 'lm'\n[train]\nmax_steps = 1\n[lm]\ntokens = '{}'\ncontext = 5\n[lm.model]\narchitecture = '{architecture}'\nlayers = 2\n\
                 width = 32\nhidden = 48\n",
                tokens.display()
            );
            let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), folder.path()).unwrap();
            let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
            let needs = crate::train::tasks::outline::needs(&recipe).unwrap();
            let shapes: Vec<_> = task
                .params
                .vars()
                .into_iter()
                .map(|(name, var)| (name, var.dims().to_vec()))
                .collect();
            let outlined: Vec<_> = needs.params.shapes().into_iter().collect();
            assert_eq!(outlined, shapes, "{architecture}");
            let tokens = task.batch(&Cursor { seed: 1, index: 0 }).unwrap().samples as f64;
            let flops = task.flops_per_sample().map(|flops| flops * tokens);
            assert_eq!(needs.flops, flops, "{architecture}");
        }
    }

    fn trained(folder: &Path, text: &str, model: &str) -> (LmTask, Vec<f64>) {
        let tokens = folder.join("text.txt");
        std::fs::write(&tokens, text).unwrap();
        let recipe = format!(
            "task = 'lm'\n[train]\nmax_steps = 60\nlog_every = 1\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\n\
             lr = 3e-3\n[schedule]\nwarmup = 5\n[lm]\ntokens = '{}'\nheld_out = 0.2\nbatch = 4\ncontext = 24\n\
             [lm.model]\nlayers = 2\nwidth = 32\nhidden = 48\nheads = 2\n{model}\n",
            tokens.display()
        );
        let run_dir = folder.join("run");
        let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), &run_dir).unwrap();
        let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let lines = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
        let losses = lines
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64());
        (task, losses.collect())
    }

    /// Every architecture learns a text that repeats itself, and what it exports is the model that it was.
    #[test]
    fn all_architectures_train_and_load_again() {
        let text: String = (0..400)
            .map(|i| ["one ", "two ", "three ", "four "][i % 4])
            .collect();
        let hybrid = "architecture = 'tnl'\nsoftmax_every = 2";
        let both = "architecture = 'lightnet'\n[lm.model.variant]\nbidirectional = true\nuse_tpe = true\nuse_lrpe = true";
        let mut models: Vec<String> = Architecture::ALL
            .iter()
            .map(|kind| format!("architecture = '{}'", kind.name()))
            .collect();
        models.extend([hybrid, both].map(str::to_owned));
        for model in models {
            let folder = tempfile::tempdir().unwrap();
            let (task, losses) = trained(folder.path(), &text, &model);
            let (first, last) = (losses[0], losses[losses.len() - 1]);
            assert!(last < 0.6 * first, "{model}: loss {first} to {last}");
            let validation = task.validate().unwrap()[0].1;
            assert!(validation < 0.6 * first, "{model}: validation {validation}");
            let exported = folder.path().join("model");
            std::fs::create_dir(&exported).unwrap();
            task.export(&exported).unwrap();
            let again = LanguageModel::load(&exported, None, DType::F32, &Device::Cpu).unwrap();
            let ids = Ids::new(&[1, 2, 3, 4], &[1, 4], again.config().vocab_size).unwrap();
            let far = (again.logits(&ids).unwrap() - task.model.logits(&ids).unwrap()).unwrap();
            assert_eq!(
                far.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(),
                0.0,
                "{model}"
            );
            assert_eq!(again.config().architecture, task.model.config().architecture);
        }
    }

    fn opened(folder: &Path, name: &str, bytes: &[u8], options: &str) -> TaskResult<LmTask> {
        let tokens = folder.join(name);
        std::fs::write(&tokens, bytes).unwrap();
        let recipe = format!(
            "task = 'lm'\n[train]\nmax_steps = 1\n[lm]\ntokens = '{}'\nbatch = 2\ncontext = 8\nheld_out = 0.3\n{options}\n\
             [lm.model]\nlayers = 1\nwidth = 16\nhidden = 16\nheads = 2\n",
            tokens.display()
        );
        let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), folder).unwrap();
        LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu)
    }

    #[test]
    fn documents_are_packed_with_their_ends() {
        let folder = tempfile::tempdir().unwrap();
        let lines: String = (10..40).map(|i| format!("{{\"text\": \"no {i}\"}}\n")).collect();
        let documents = "packing = 'documents'\norder = 'sequential'";
        let task = opened(folder.path(), "x.jsonl", lines.as_bytes(), documents).unwrap();
        assert_eq!(&task.tokens[..7], [110, 111, 32, 49, 48, 0, 110]);
        let batch = task.batch(&Cursor { seed: 1, index: 0 }).unwrap();
        let borders: Vec<u32> = batch.get("borders").unwrap().to_vec1().unwrap();
        assert_eq!(borders, [0, 6, 8, 12, 16]);
        let targets: Vec<u32> = batch
            .get("targets")
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(targets[4..7], [0, IGNORED, 111]);
        let loss = task.validate().unwrap()[0].1;
        assert!(loss.is_finite() && loss > 1.0, "{loss}");
        // Prepared tokens say which of them ends documents.
        let ids: Vec<u8> = task.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        let prepared = opened(
            folder.path(),
            "x.u16",
            &ids,
            &format!("{documents}\nend_of_document = 0"),
        )
        .unwrap();
        assert_eq!(prepared.validate().unwrap()[0].1, loss);
    }

    /// A file of its own is held out whole, and nothing of the other.
    #[test]
    fn a_file_may_be_held_out() {
        let folder = tempfile::tempdir().unwrap();
        let held = folder.path().join("held.txt");
        std::fs::write(&held, "other words ".repeat(5)).unwrap();
        let options = format!("held_out_tokens = '{}'\nvalidation = 3", held.display());
        let task = opened(folder.path(), "x.txt", &[b'a'; 100], &options).unwrap();
        assert_eq!((task.trained, task.tokens.len()), (100, 160));
        assert_eq!(task.tokens[99..102], [97, 111, 116]);
        assert!(
            task.starts(&Cursor { seed: 1, index: 0 })
                .iter()
                .all(|start| start + 9 <= 100)
        );
        assert!(task.validate().unwrap()[0].1 > 1.0);
        std::fs::write(&held, "short").unwrap();
        let line = opened(folder.path(), "x.txt", &[b'a'; 100], &options)
            .err()
            .unwrap()
            .to_string();
        assert!(
            line.contains("100 tokens to train on and 5 held out, expected 9"),
            "{line}"
        );
        let missing = opened(
            folder.path(),
            "x.txt",
            &[b'a'; 100],
            "held_out_tokens = 'none.txt'",
        );
        assert!(missing.err().unwrap().to_string().starts_with("none.txt: "));
    }

    #[test]
    fn documents_that_are_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let line = |name: &str, bytes: &[u8], options: &str| {
            let refused = opened(folder.path(), name, bytes, options)
                .err()
                .unwrap()
                .to_string();
            assert_eq!(refused.lines().count(), 1, "{refused}");
            refused
        };
        let good = "{\"text\": \"many words of one document\"}\n".repeat(4);
        let documents = "packing = 'documents'";
        for (name, bytes, options, words) in [
            (
                "x.jsonl",
                &b"{\"text\": \"a\", \"id\": 3}\n"[..],
                "",
                "line 1: found unknown field `id`",
            ),
            ("x.jsonl", b"{\"text\": \"\xff\"}\n", "", "no UTF-8 at byte 10"),
            (
                "x.jsonl",
                b"{\"text\": \"a\\u0000\"}\n",
                "",
                "document 0 has a character 0",
            ),
            (
                "x.txt",
                good.as_bytes(),
                documents,
                "packing is documents, expected JSONL",
            ),
            (
                "x.jsonl",
                good.as_bytes(),
                "end_of_document = 3",
                "end_of_document is for other files",
            ),
            ("x.u16", &[1; 200], "", "token 0 is 257, expected less than 256"),
            (
                "x.jsonl",
                good.as_bytes(),
                "packing = 'documents'\n[lm.model.variant]\nconv_size = 4",
                "packed sequences are not for short convolutions",
            ),
        ] {
            let found = line(name, bytes, options);
            assert!(found.contains(words), "{found}");
        }
    }

    #[test]
    fn variants_are_those_of_the_configuration() {
        let read = |text: &str| toml::from_str::<ModelOptions>(text).map(|options| options.config());
        let config = read(
            "architecture = 'tnl'\nlayers = 8\nsoftmax_every = 4\nkey_value_heads = 2\n[variant]\nnorm_per_head = true\n\
             conv_size = 4\ndecay_schedule = 'linear8'\nlrpe_layers = [0]",
        )
        .unwrap();
        let layers: Vec<usize> = (0..8)
            .filter(|&layer| config.softmax_layer(layer).is_some())
            .collect();
        assert_eq!((layers, config.attn[0].num_kv_heads), (vec![3, 7], Some(2)));
        assert!(config.norm_per_head && config.conv_size == Some(4) && config.lrpe_layers == [0]);
        let expected = Config {
            norm_per_head: false,
            conv_size: None,
            attn: Vec::new(),
            lrpe_layers: Vec::new(),
            ..config.clone()
        };
        assert_eq!(
            expected.decay_schedule,
            fulgur_lightnet::lm::DecaySchedule::Linear8
        );
        let line = read("[variant]\nnorm = 3").unwrap_err().to_string();
        assert!(line.contains("unknown field `norm`"), "{line}");
    }

    /// 200 steps of AdamW from a given start on given tokens, beside PyTorch and transformers (`tests/golden/llama_steps.py`).
    #[test]
    fn losses_are_those_of_pytorch() {
        let golden: Value =
            serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/llama_steps.json")).unwrap()).unwrap();
        for name in ["untied", "tied"] {
            let model = format!("{GOLDEN}/llama_{name}");
            let shape = shape_of(&model);
            let folder = tempfile::tempdir().unwrap();
            let tokens = folder.path().join("tokens.u16");
            std::fs::copy(format!("{GOLDEN}/llama_tokens.bin"), &tokens).unwrap();
            let recipe = format!(
                "task = 'lm'\n[train]\nstart = '{model}/model.safetensors'\nmax_steps = 200\nema = 0.0\nlog_every = 1\n\
                 checkpoint_seconds = 1e9\n[optimiser]\nlr = 3e-3\nbeta1 = 0.9\nbeta2 = 0.95\nweight_decay = 0.1\n\
                 [schedule]\nwarmup = 20\nfloor = 0.1\n[lm]\ntokens = '{}'\nheld_out = 0.0\nbatch = 8\ncontext = 64\n\
                 order = 'sequential'\n[lm.model]\narchitecture = 'llama'\nvocabulary = 97\n{shape}\n",
                tokens.display()
            );
            let run_dir = folder.path().join("run");
            let recipe = Recipe::check(recipe.parse().unwrap(), "test".into(), &run_dir).unwrap();
            let task = LmTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
            run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
            let lines = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
            let found: Vec<f64> = lines
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64())
                .collect();
            let wanted = golden[name]["loss"].as_array().unwrap();
            assert_eq!(found.len(), wanted.len());
            for (step, (found, wanted)) in found.iter().zip(wanted).enumerate() {
                let wanted = wanted.as_f64().unwrap();
                assert!(
                    (found - wanted).abs() < 1e-4 * wanted,
                    "{name}, step {step}: {found}, expected {wanted}"
                );
            }
        }
    }

    /// The shape of a model as its `config.json` says.
    fn shape_of(model: &str) -> String {
        let config: Value =
            serde_json::from_slice(&std::fs::read(format!("{model}/config.json")).unwrap()).unwrap();
        let keys = [
            ("width", "hidden_size"),
            ("hidden", "intermediate_size"),
            ("layers", "num_hidden_layers"),
            ("heads", "num_attention_heads"),
            ("key_value_heads", "num_key_value_heads"),
            ("head_width", "head_dim"),
            ("tied", "tie_word_embeddings"),
            ("norm_eps", "rms_norm_eps"),
        ];
        keys.map(|(own, theirs)| format!("{own} = {}", config[theirs]))
            .join("\n")
    }
}

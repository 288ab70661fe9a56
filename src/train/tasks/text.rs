//! Trains the text encoder: its sentence vectors follow MiniLM's, and its states keep the words.
//!
//! The lessons (sentences, teacher's vectors, vocabulary) are prepared once, on the CPU, when they are missing; with
//! them in place nothing else is read.

mod judge;
mod prepare;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::params::{Params, Precision};
use fulgur_tavdiffusion::text::distil::{Hidden, match_loss, recall_loss, relation_loss};
use fulgur_tavdiffusion::text::teacher::Lessons;
use fulgur_tavdiffusion::text::{TextBatch, TextConfig, TextEncoder, TextTokenizer, Tokens};
use serde::{Deserialize, Serialize};

use crate::train::{Batch, Cursor, Losses, Recipe, Step, Task, TaskResult, TrainError};
use judge::Candidate;

/// One lesson in so many is held out.
const HELD_OUT_ONE_IN: usize = 25;
/// Held-out sentences that are judged.
const JUDGED: usize = 512;
/// Sentences that are judged at once.
const JUDGED_AT_ONCE: usize = 64;

/// The table `[text]` of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Settings {
    /// Folder of `lessons.safetensors` and `tokenizer.json`; prepared when they are missing.
    lessons: PathBuf,
    /// Prepared set `stamps`: things and their names.
    things: PathBuf,
    /// Folder with the data files of WordNet.
    wordnet: PathBuf,
    /// Folder of the teacher.
    teacher: PathBuf,
    /// Sentences that the teacher reads.
    sentences: usize,
    /// Sentences a batch.
    batch: usize,
    /// Share of the pieces that are hidden.
    hidden: f32,
    /// Weights of the losses.
    matching: f64,
    relation: f64,
    recall: f64,
    /// Shape of the encoder.
    pub(super) model: TextConfig,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lessons: "data/text".into(),
            things: "data/stamps".into(),
            wordnet: "data/wordnet".into(),
            teacher: "data/minilm".into(),
            sentences: 44_000,
            batch: 128,
            hidden: 0.08,
            matching: 4.0,
            relation: 1.0,
            recall: 0.1,
            model: TextConfig::default(),
        }
    }
}

/// Lessons and vocabulary in a folder.
fn paths(folder: &Path) -> (PathBuf, PathBuf) {
    (folder.join("lessons.safetensors"), folder.join("tokenizer.json"))
}

struct Text {
    settings: Settings,
    params: Params,
    encoder: TextEncoder,
    tokenizer: TextTokenizer,
    lessons: Lessons,
    /// Every lesson in pieces.
    tokens: Vec<Tokens>,
    candidates: Vec<Candidate>,
    /// Dtype inside the blocks.
    compute: Option<DType>,
}

/// Builds the task, preparing the lessons when they are missing.
///
/// # Errors
/// The recipe's table, a source of the lessons, the lessons themselves, or `stop` set while they are prepared.
pub(super) fn build(recipe: &Recipe, device: &Device, stop: &AtomicBool) -> TaskResult<Box<dyn Task>> {
    let settings: Settings = recipe.own()?;
    check(&settings, recipe)?;
    let (lessons_path, tokenizer_path) = paths(&settings.lessons);
    if !lessons_path.exists() || !tokenizer_path.exists() {
        prepare::prepare(&settings, recipe.seed, stop)?;
    }
    let lessons = Lessons::load(&lessons_path)?;
    let tokenizer = TextTokenizer::load(&tokenizer_path)?;
    let pairs = [
        (
            "vocab_size",
            settings.model.vocab_size,
            tokenizer.vocabulary(),
            &tokenizer_path,
        ),
        (
            "sentence_size",
            settings.model.sentence_size,
            lessons.width(),
            &lessons_path,
        ),
    ];
    for (field, given, found, path) in pairs {
        if given < found || (field == "sentence_size" && given != found) {
            return Err(format!(
                "[text] model.{field} is {given}, but {} has {found}",
                path.display()
            )
            .into());
        }
    }
    let params = Params::random(recipe.seed, device);
    let encoder = TextEncoder::new(&settings.model, &params.builder())?;
    let longest = settings.model.max_position_embeddings;
    let tokens = (0..lessons.len())
        .map(|i| tokenizer.encode(lessons.sentence(i), longest))
        .collect::<Result<_, _>>()?;
    let candidates = prepare::candidates(&lessons)?;
    let compute = device.is_cuda().then_some(DType::BF16);
    Ok(Box::new(Text {
        settings,
        params,
        encoder,
        tokenizer,
        lessons,
        tokens,
        candidates,
        compute,
    }))
}

fn check(settings: &Settings, recipe: &Recipe) -> Result<(), TrainError> {
    let weight = |x: f64| x >= 0.0 && x.is_finite();
    let rules = [
        (
            settings.batch > 1,
            "batch",
            "2 or more",
            settings.batch.to_string(),
        ),
        (
            settings.sentences >= 2,
            "sentences",
            "2 or more",
            settings.sentences.to_string(),
        ),
        (
            (0.0..1.0).contains(&settings.hidden),
            "hidden",
            "0 or more and below 1",
            settings.hidden.to_string(),
        ),
        (
            weight(settings.matching),
            "matching",
            "0 or more",
            settings.matching.to_string(),
        ),
        (
            weight(settings.relation),
            "relation",
            "0 or more",
            settings.relation.to_string(),
        ),
        (
            weight(settings.recall),
            "recall",
            "0 or more",
            settings.recall.to_string(),
        ),
    ];
    match rules.into_iter().find(|(holds, ..)| !holds) {
        None => Ok(()),
        Some((_, field, expected, found)) => Err(TrainError::Recipe {
            origin: recipe.origin.clone(),
            reason: format!("text.{field}: found {found}, expected {expected}"),
        }),
    }
}

impl Text {
    /// Lessons are in random order: the last ones are held out.
    fn familiar(&self) -> usize {
        (self.lessons.len() - self.lessons.len() / HELD_OUT_ONE_IN).max(1)
    }

    /// Unit rows `[B, s]` on the host.
    fn encode(&self, rows: &[Tokens]) -> candle_core::Result<Tensor> {
        let part = |rows: &[Tokens]| {
            let batch = TextBatch::new(rows, self.params.device())?;
            let states = self.encoder.forward(&batch.ids, &batch.mask, self.compute)?;
            states
                .sentence
                .detach()
                .to_dtype(DType::F32)?
                .to_device(&Device::Cpu)
        };
        let parts: Vec<Tensor> = rows
            .chunks(JUDGED_AT_ONCE)
            .map(part)
            .collect::<candle_core::Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    fn encode_texts(&self, texts: &[String]) -> candle_core::Result<Tensor> {
        let longest = self.settings.model.max_position_embeddings;
        let rows: Result<Vec<Tokens>, _> = texts
            .iter()
            .map(|text| self.tokenizer.encode(text, longest))
            .collect();
        self.encode(&rows.map_err(candle_core::Error::wrap)?)
    }
}

impl Task for Text {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let chosen = cursor.shuffled(self.familiar(), self.settings.batch);
        let mut rows: Vec<Tokens> = chosen.iter().map(|&i| self.tokens[i].clone()).collect();
        let pieces = self.tokenizer.vocabulary();
        let hidden = Hidden::draw(
            &mut rows,
            self.settings.hidden,
            pieces,
            &mut cursor.noise("hidden"),
        );
        let (places, targets) = hidden.tensors(&Device::Cpu)?;
        let TextBatch { ids, mask, .. } = TextBatch::new(&rows, &Device::Cpu)?;
        let batch = Batch::new(rows.len()).with("ids", ids).with("mask", mask);
        let batch = batch.with("places", places).with("targets", targets);
        Ok(batch.with("teacher", self.lessons.vectors(&chosen)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let states = self
            .encoder
            .forward(batch.get("ids")?, batch.get("mask")?, self.compute)?;
        let teacher = batch.get("teacher")?;
        let parts = vec![
            ("match", match_loss(&states.sentence, teacher)?),
            ("relation", relation_loss(&states.sentence, teacher)?),
            (
                "recall",
                recall_loss(
                    &self.encoder,
                    &states,
                    batch.get("places")?,
                    batch.get("targets")?,
                )?,
            ),
        ];
        let Settings {
            matching,
            relation,
            recall,
            ..
        } = self.settings;
        let weighted = [matching, relation, recall]
            .into_iter()
            .zip(&parts)
            .map(|(weight, (_, part))| part * weight);
        let terms = weighted.collect::<candle_core::Result<Vec<_>>>()?;
        let total = Tensor::stack(&terms, 0)?.sum_all()?;
        Ok(Losses { total, parts })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let judged: Vec<usize> = (self.familiar()..self.lessons.len()).take(JUDGED).collect();
        let mut figures = Vec::new();
        if !judged.is_empty() {
            let rows: Vec<Tokens> = judged.iter().map(|&i| self.tokens[i].clone()).collect();
            let (distance, rank) = judge::agreement(&self.encode(&rows)?, &self.lessons.vectors(&judged)?)?;
            figures.push(("distance".to_owned(), distance));
            figures.extend(rank.map(|rank| ("spearman".to_owned(), rank)));
        }
        let found = judge::find(&self.candidates, &|texts| self.encode_texts(texts))?;
        if found.asked > 0 {
            let share = |n: usize| n as f64 / found.asked as f64;
            figures.push(("prompts_top1".to_owned(), share(found.first)));
            figures.push(("prompts_top5".to_owned(), share(found.five)));
        }
        Ok(figures)
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_text(&folder.join("tokenizer.json"), &self.tokenizer.to_json()?)?;
        let config = serde_json::to_string_pretty(&self.settings.model)?;
        write_text(&folder.join("config.json"), &(config + "\n"))?;
        self.params.save(
            &folder.join("model.safetensors"),
            &BTreeMap::new(),
            Precision::F16,
        )?;
        Ok(())
    }
}

fn write_text(path: &Path, text: &str) -> TaskResult<()> {
    write_atomic(path, |file| file.write_all(text.as_bytes()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use fulgur_tavdiffusion::text::TextModel;

    use super::*;

    /// Nobody asks to stop.
    static ON: AtomicBool = AtomicBool::new(false);

    /// Four sentences, each with a direction of its own, and the folder that they are in.
    fn lessons() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let sentences = [
            "a dog barks",
            "a violin plays",
            "rain falls on a roof",
            "a train rattles by",
        ];
        let (lessons_path, tokenizer_path) = paths(folder.path());
        let tokenizer = TextTokenizer::train(&sentences, 300).unwrap();
        write_text(&tokenizer_path, &tokenizer.to_json().unwrap()).unwrap();
        let mut lessons = Lessons::new(8);
        for (number, sentence) in sentences.iter().cycle().take(60).enumerate() {
            let mut vector = [0.0; 8];
            vector[number % 4] = 1.0;
            lessons.push(sentence, &vector);
        }
        let things = r#"[["dog", ["a dog"], [["barks", "barking"]]], ["violin", ["a violin"], [["plays", "playing"]]]]"#;
        lessons.notes.insert(prepare::THINGS_NOTE.into(), things.into());
        lessons.save(&lessons_path).unwrap();
        folder
    }

    fn recipe(folder: &Path, more: &str) -> Recipe {
        let text = format!(
            "task = 'text'\n[train]\nmax_steps = 1\n[text]\nlessons = {:?}\nbatch = 8\n{more}\n[text.model]\n\
            model_type = 'fulgur-text'\nvocab_size = 300\nembedding_size = 8\nhidden_size = 16\n\
            num_hidden_layers = 1\nnum_attention_heads = 2\nhead_dim = 4\nintermediate_size = 16\n\
            max_position_embeddings = 12\nsentence_size = 8",
            folder.display().to_string(),
        );
        Recipe::check(text.parse().unwrap(), "test.toml".into(), Path::new("runs/test")).unwrap()
    }

    #[test]
    fn a_small_encoder_learns_and_its_export_loads() -> TaskResult<()> {
        let folder = lessons();
        let task = build(&recipe(folder.path(), ""), &Device::Cpu, &ON)?;
        let loss = |index| -> TaskResult<(f32, candle_core::backprop::GradStore)> {
            let cursor = Cursor { seed: 1, index };
            let step = Step {
                number: index,
                progress: 0.0,
                cursor,
            };
            let total = task.loss(&task.batch(&cursor)?, &step)?.total;
            Ok((total.to_scalar()?, total.backward()?))
        };
        let first = loss(0)?.0;
        for index in 0..60 {
            let gradients = loss(index)?.1;
            for var in task.params().vars().values() {
                if let Some(gradient) = gradients.get(var) {
                    var.set(&(var.as_tensor() - (gradient * 0.05)?)?)?;
                }
            }
        }
        let last = loss(0)?.0;
        assert!(last < 0.6 * first, "{first} to {last}");
        let figures = task.validate()?;
        assert_eq!(figures[0].0, "distance");
        assert!(figures.iter().any(|(name, _)| name == "prompts_top5"));

        let target = tempfile::tempdir().unwrap();
        task.export(target.path())?;
        let states = TextModel::load(target.path(), &Device::Cpu)?.encode(&["a dog barks", ""])?;
        assert_eq!(states.sentence.dims(), [2, 8]);
        Ok(())
    }

    #[test]
    fn batches_depend_on_the_cursor_alone_and_bad_tables_are_named() -> TaskResult<()> {
        let folder = lessons();
        let task = build(&recipe(folder.path(), "hidden = 0.5"), &Device::Cpu, &ON)?;
        let ids = |index| -> TaskResult<Vec<Vec<u32>>> {
            Ok(task.batch(&Cursor { seed: 1, index })?.get("ids")?.to_vec2()?)
        };
        assert_eq!(ids(3)?, ids(3)?);
        assert_ne!(ids(3)?, ids(4)?);
        for (more, field) in [
            ("hidden = 1.0", "text.hidden"),
            ("recall = -1.0", "text.recall"),
            ("odd = 1", "odd"),
        ] {
            let message = build(&recipe(folder.path(), more), &Device::Cpu, &ON)
                .err()
                .map(|e| e.to_string());
            assert!(
                message.as_ref().is_some_and(|message| message.contains(field)),
                "{message:?}"
            );
        }
        // Whatever data sets this checkout has: these are none.
        let absent = "things = '/nonexistent/things'";
        let message = build(&recipe(Path::new("/nonexistent"), absent), &Device::Cpu, &ON)
            .err()
            .map(|e| e.to_string());
        assert!(message.is_some_and(|message| message.contains("fulgur data fetch")));
        Ok(())
    }
}

//! Texts that go on: a prompt in pieces, then tokens one by one, of one sequence or several at once.

use std::collections::VecDeque;

use candle_core::{DType, Result, Tensor, bail};
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::likeliest::likeliest;
use fulgur_kernels::linear::FEW_ROWS;

use super::model::LanguageModel;
use super::replay::Stepping;
use super::sampling::{MOST_RECENT, Sampling, SamplingError};
use super::state::State;

/// Most sequences that are decoded together: as many as have the same logits together as alone.
pub const MOST_TOGETHER: usize = FEW_ROWS;

/// Why a text does not go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No token can be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// An operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Sequences, most often of one length, with what a model keeps of them. Clones are forks.
#[derive(Clone, Debug)]
pub struct Session {
    state: State,
    /// `[B, V]`, of the tokens after those of the state.
    logits: Option<Tensor>,
    /// Chosen tokens that the model has not seen.
    pending: Option<Vec<u32>>,
    /// The last tokens of each sequence.
    recent: Vec<VecDeque<u32>>,
    /// Number of each sequence.
    numbers: Vec<u32>,
    /// By how many tokens each sequence is longer than the state says.
    longer: Vec<usize>,
    stepping: Stepping,
}

impl Session {
    /// One sequence without tokens.
    pub fn new(model: &LanguageModel) -> Self {
        Self {
            state: model.start(),
            logits: None,
            pending: None,
            recent: vec![VecDeque::new()],
            numbers: vec![0],
            longer: vec![0],
            stepping: Stepping::default(),
        }
    }

    /// One sequence that was kept: its state, the logits `[1, V]` after it and its last tokens.
    pub(super) fn kept(state: State, logits: Tensor, recent: &[u32]) -> Self {
        Self {
            state,
            logits: Some(logits),
            pending: None,
            recent: vec![recent.iter().copied().collect()],
            numbers: vec![0],
            longer: vec![0],
            stepping: Stepping::default(),
        }
    }

    /// The same sequences, whose steps are not recorded: see [`Self::is_recorded`].
    ///
    /// # Errors
    /// A failing operation.
    pub fn unrecorded(mut self) -> Result<Self> {
        self.stepping.leave(&mut self.state, &mut self.logits)?;
        self.stepping = Stepping::plain();
        Ok(self)
    }

    /// Whether single tokens go through the model by a step that was recorded, as they do on a GPU after some of them where
    /// all that the model keeps has a constant size.
    pub fn is_recorded(&self) -> bool {
        self.stepping.is_recorded()
    }

    /// Why they do not, once it is known.
    pub fn why_not_recorded(&self) -> Option<&str> {
        self.stepping.refused()
    }

    /// What the model keeps.
    ///
    /// # Errors
    /// There is no memory for a copy, where the next token would change it.
    pub fn state(&self) -> Result<State> {
        self.stepping.kept(&self.state)
    }

    /// Bytes of it.
    pub fn state_bytes(&self) -> usize {
        self.state.bytes()
    }

    /// Tokens of each sequence, chosen ones included.
    pub fn tokens(&self) -> usize {
        self.state.tokens() + usize::from(self.pending.is_some())
    }

    /// The last tokens of the sequence at place `row`, at most [`MOST_RECENT`].
    pub fn recent(&self, row: usize) -> Vec<u32> {
        self.recent[row].iter().copied().collect()
    }

    /// Numbers of the sequences.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// The logits `[B, V]` after all tokens that the model has seen, once there are some. The next token may change them.
    pub fn logits(&self) -> Option<&Tensor> {
        self.logits.as_ref()
    }

    /// Reads `ids` behind the one sequence, `chunk` of them at a time; between chunks `go_on` is told how many have been read, and
    /// ends the reading by `false`. How many were read.
    ///
    /// # Errors
    /// Several sequences, ids beyond the vocabulary, a model in both directions, or a failing operation.
    pub fn read(
        &mut self,
        model: &LanguageModel,
        ids: &[u32],
        chunk: usize,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<usize> {
        if self.numbers.len() != 1 {
            bail!("{} sequences, expected one to read a prompt", self.numbers.len());
        }
        self.settle(model)?;
        self.stepping.leave(&mut self.state, &mut self.logits)?;
        let mut read = 0;
        for chunk in ids.chunks(chunk.max(1)) {
            let piece = Ids::new(chunk, &[1, chunk.len()], model.config().vocab_size)?;
            self.logits = Some(model.prefill(&piece, &mut self.state)?);
            chunk.iter().for_each(|&id| note(&mut self.recent[0], id));
            read += chunk.len();
            if !go_on(read) {
                break;
            }
        }
        Ok(read)
    }

    /// Forks the one sequence into those of these numbers.
    ///
    /// # Errors
    /// Several sequences, or none asked for.
    pub fn fork(&self, numbers: &[u32]) -> Result<Self> {
        if self.numbers.len() != 1 || self.pending.is_some() {
            bail!("{} sequences, expected one that has settled", self.numbers.len());
        }
        let mut forked = self.choose_rows(&vec![0; numbers.len()])?;
        forked.numbers = numbers.to_vec();
        Ok(forked)
    }

    /// Leaves out all sequences but those at these places.
    ///
    /// # Errors
    /// There is no such place.
    pub fn keep(&mut self, places: &[u32]) -> Result<()> {
        if places.len() < self.numbers.len() {
            *self = self.choose_rows(places)?;
        }
        Ok(())
    }

    /// Sequences that were read apart as one batch, each with its number.
    ///
    /// # Errors
    /// None, one that has not settled or has no tokens, or different lengths for a model that sees positions.
    pub fn joined(model: &LanguageModel, sessions: &[&Self]) -> Result<Self> {
        let Some(shortest) = sessions.iter().map(|session| session.state.tokens()).min() else {
            bail!("no sequences to join")
        };
        let (mut logits, mut longer) = (Vec::new(), Vec::new());
        for session in sessions {
            let more = session.state.tokens() - shortest;
            if more > 0 && model.config().sees_positions() {
                bail!(
                    "{more} tokens more than others have, expected as many for a model that sees positions"
                );
            }
            match (&session.logits, &session.pending) {
                (Some(rows), None) => logits.push(rows),
                _ => bail!("a sequence without tokens or that has not settled"),
            }
            longer.extend(session.longer.iter().map(|longer| longer + more));
        }
        let states: Vec<State> = sessions
            .iter()
            .map(|session| session.state())
            .collect::<Result<_>>()?;
        let states: Vec<&State> = states.iter().collect();
        let each = || sessions.iter();
        Ok(Self {
            state: State::joined(&states)?.at(shortest),
            // Of one alone this is the same tensor.
            logits: Some(Tensor::cat(&logits, 0)?.force_contiguous()?),
            pending: None,
            recent: each().flat_map(|session| session.recent.clone()).collect(),
            numbers: each().flat_map(|session| session.numbers.clone()).collect(),
            longer,
            stepping: Stepping::default(),
        })
    }

    fn choose_rows(&self, rows: &[u32]) -> Result<Self> {
        let logits = match &self.logits {
            Some(logits) => Some(logits.index_select(&Tensor::new(rows, logits.device())?, 0)?),
            None => None,
        };
        let places = || rows.iter().map(|&row| row as usize);
        Ok(Self {
            state: self.state.select(rows)?,
            logits,
            pending: (self.pending.as_ref()).map(|pending| places().map(|row| pending[row]).collect()),
            recent: places().map(|row| self.recent[row].clone()).collect(),
            numbers: places().map(|row| self.numbers[row]).collect(),
            longer: places().map(|row| self.longer[row]).collect(),
            stepping: self.stepping.begun_anew(),
        })
    }

    /// Chooses the next token of each sequence among the first `vocabulary` ones.
    ///
    /// # Errors
    /// There are no tokens yet, logits that are no numbers, or a failing operation.
    pub fn next(
        &mut self,
        model: &LanguageModel,
        sampling: &Sampling,
        vocabulary: usize,
    ) -> std::result::Result<Vec<u32>, SessionError> {
        self.settle(model)?;
        let Some(logits) = &self.logits else {
            return Err(SamplingError::Nothing.into());
        };
        let chosen = match sampling.is_greedy() {
            true => chosen_greedily(logits, vocabulary)?,
            false => None,
        };
        let chosen = match chosen {
            Some(chosen) => chosen,
            None => {
                let rows: Vec<Vec<f32>> = logits.to_dtype(DType::F32)?.to_vec2()?;
                let mut chosen = Vec::with_capacity(rows.len());
                for (row, logits) in rows.iter().enumerate() {
                    let logits = &logits[..logits.len().min(vocabulary)];
                    let position = self.state.tokens() + self.longer[row];
                    let recent = self.recent[row].make_contiguous();
                    chosen.push(sampling.choose(logits, recent, self.numbers[row], position)?);
                }
                chosen
            }
        };
        for (recent, &id) in self.recent.iter_mut().zip(&chosen) {
            note(recent, id);
        }
        self.pending = Some(chosen.clone());
        Ok(chosen)
    }

    /// Shows the model what was chosen last.
    ///
    /// # Errors
    /// A failing operation.
    pub fn settle(&mut self, model: &LanguageModel) -> Result<()> {
        if let Some(pending) = self.pending.take() {
            self.logits = Some(self.stepping.step(model, &pending, &mut self.state)?);
        }
        Ok(())
    }

    /// Shows the model `ids`, one for each sequence.
    ///
    /// # Errors
    /// Another number of ids, ids beyond the vocabulary, or a failing operation.
    pub fn append(&mut self, model: &LanguageModel, ids: &[u32]) -> Result<()> {
        if ids.len() != self.numbers.len() {
            bail!(
                "{} ids, expected one for each of {}",
                ids.len(),
                self.numbers.len()
            );
        }
        self.settle(model)?;
        for (recent, &id) in self.recent.iter_mut().zip(ids) {
            note(recent, id);
        }
        self.pending = Some(ids.to_vec());
        self.settle(model)
    }
}

/// The likeliest token of each row, where the logits lie; none where one of them is no number, which the choice on the host
/// names.
fn chosen_greedily(logits: &Tensor, vocabulary: usize) -> Result<Option<Vec<u32>>> {
    let among = logits.dim(1)?.min(vocabulary);
    if among == 0 || !matches!(logits.dtype(), DType::F32 | DType::BF16) {
        return Ok(None);
    }
    Ok(likeliest(logits, among)?.into_iter().collect())
}

fn note(recent: &mut VecDeque<u32>, id: u32) {
    if recent.len() == MOST_RECENT {
        recent.pop_front();
    }
    recent.push_back(id);
}

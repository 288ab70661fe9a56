//! The evaluation itself: real pictures before the judges, pictures out of noise, and what is made of both.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use fulgur_benchmark::metrics::points::Points;
use fulgur_datasets::labelled::Part;
use fulgur_datasets::media::Picture;
use fulgur_kernels::philox::Philox;
use serde::Serialize;

use super::accuracy::Accuracy;
use super::distances::{Distances, FEWEST, Shuffled};
use super::judge::{Judge, LAYER, Seen};
use super::labellings::Labellings;
use super::neighbours::Neighbours;
use super::samples::{By, Drawn, Plan};
use super::search::Search;
use super::sheet::{self, Cell, Row};
use crate::paint::{Painter, Settings};

/// Most bytes of pictures that are drawn, and of training pictures.
const MOST_BYTES: usize = 8 << 30;
/// Pictures in the proportions of real ones, unless another number is asked for.
const MATCHED: usize = 1000;

/// What takes part.
pub struct Parts<'a> {
    /// What draws.
    pub painter: Painter<'a>,
    /// Names its model in errors.
    pub model: String,
    /// The pictures and their classes.
    pub labellings: &'a Labellings,
    /// Classifiers, at least one; features of the first one say what is near.
    pub judges: &'a [Judge],
}

/// What is evaluated.
#[derive(Clone, Debug)]
pub struct Options {
    /// What steers the pictures; all that the model and the set have if empty.
    pub by: Vec<By>,
    /// Judged pictures of each class, at least 1.
    pub samples: usize,
    /// Judged pictures of each caption, at least 1.
    pub per_caption: usize,
    /// Pictures in the proportions of the training pictures for distances, 0 for none; if absent as many as are held out, at most
    /// 1,000.
    pub matched: Option<usize>,
    /// At most so many training pictures, chosen by lot.
    pub training: Option<usize>,
    /// Pictures drawn at a time.
    pub batch: usize,
    /// How they are drawn.
    pub settings: Settings,
    /// Whether a grid of drawn pictures is wanted.
    pub grid: bool,
    /// Whether nearest training pictures are wanted as a sheet.
    pub sheet: bool,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Judges look at real pictures.
    Real,
    /// Pictures are drawn; counted in steps of a picture.
    Draw,
    /// Judges look at drawn pictures.
    Drawn,
    /// Nearest training pictures are looked for.
    Neighbours,
}

/// How far the evaluation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// How much of it is done.
    pub done: u64,
    /// And of how much.
    pub total: u64,
}

/// How many pictures were drawn.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Count {
    /// Different wishes: classes, or captions.
    pub wishes: usize,
    /// Pictures of each that are judged.
    pub each: usize,
    /// Pictures that are judged.
    pub judged: usize,
    /// Pictures in the proportions of real ones, for distances.
    pub matched: usize,
    /// All pictures.
    pub drawn: usize,
}

/// What a judge says about pictures drawn by one kind of wish.
#[derive(Clone, Debug, Serialize)]
pub struct OfDrawn {
    /// How often it sees what was to be drawn; absent where classes of the model lie within no class of the judge.
    pub accuracy: Option<Accuracy>,
    /// How far from real pictures they are; absent where none were drawn for that.
    pub distances: Option<Distances>,
}

/// Where features come from.
#[derive(Clone, Debug, Serialize)]
pub struct FeatureName {
    /// The layer of the judge.
    pub layer: &'static str,
    /// Values of a picture.
    pub width: usize,
}

/// What a judge says.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// Its folder.
    pub judge: PathBuf,
    /// The set whose classes it knows.
    pub set: String,
    /// Its parameters.
    pub parameters: u64,
    /// Height and width that pictures are resized to.
    pub image_size: [usize; 2],
    /// Where its features come from.
    pub features: FeatureName,
    /// Real held-out pictures: the ceiling.
    pub real: Accuracy,
    /// Drawn pictures, by what steered them.
    pub by: BTreeMap<By, OfDrawn>,
}

/// The figures of a generator of pictures.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Height and width of the drawn pictures.
    pub image_size: [usize; 2],
    /// Training pictures that were compared.
    pub training: usize,
    /// Held-out pictures.
    pub held_out: usize,
    /// How many pictures were drawn.
    pub drawn: BTreeMap<By, Count>,
    /// What the judges say.
    pub judges: Vec<Judged>,
    /// How near drawn pictures come to training pictures.
    pub neighbours: Option<Neighbours>,
    /// Rows of the sheet of neighbours.
    pub nearest: Vec<Row>,
    /// Pictures of the grid.
    pub cells: Vec<Cell>,
    /// Seconds in which pictures were drawn.
    pub draw_s: f64,
    /// Whether everything was drawn.
    pub finished: bool,
    /// The grid.
    #[serde(skip)]
    pub grid: Option<Picture>,
    /// The sheet of neighbours.
    #[serde(skip)]
    pub sheet: Option<Picture>,
}

/// Real pictures as a judge has seen them.
pub(super) struct Real {
    /// The training pictures, where anything asks for them.
    pub(super) training: Option<Seen>,
    pub(super) held_out: Seen,
}

/// Judges a generator of pictures. When `cancel` is set while pictures are drawn, the figures cover the whole rounds of classes
/// or captions that were drawn by then.
///
/// # Errors
/// Parts that do not go together, too few pictures for what is asked, values that are not finite, a failing operation, or a stop
/// before anything could be judged.
pub fn evaluate(
    parts: &Parts<'_>,
    options: &Options,
    cancel: &AtomicBool,
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Evaluation> {
    let set = &parts.labellings.set;
    let held_out = set.part(Part::HeldOut);
    let training = chosen(set.part(Part::Train), options.training);
    let plans = plans(parts, options, held_out.len())?;
    let with_distances = plans
        .iter()
        .any(|plan| plan.items.iter().any(|item| item.matched > 0));
    if with_distances {
        check_fewest("training pictures", training.len())?;
        check_fewest("held-out pictures", held_out.len())?;
    }
    check_bytes(parts, options, &plans, training.len() + held_out.len())?;

    let real = look_at_real(parts, (&training, &held_out), with_distances, cancel, on_progress)?;
    let began = Instant::now();
    let mut all = draw(parts, options, plans, cancel, on_progress)?;
    let draw_s = began.elapsed().as_secs_f64();
    let finished = all.iter().all(|drawn| drawn.finished);
    all.retain(|drawn| !drawn.equal().is_empty());
    if all.is_empty() {
        bail!("stopped before one picture of each wish was drawn");
    }
    let seen = look_at_drawn(parts, &all, on_progress)?;
    let mut judges = Vec::with_capacity(parts.judges.len());
    for ((judge, real), seen) in parts.judges.iter().zip(&real).zip(&seen) {
        judges.push(judged(
            parts,
            judge,
            real,
            &held_out,
            &all,
            seen,
            options.settings.seed,
        )?);
    }
    let mut evaluation = Evaluation {
        image_size: options.settings.size,
        training: training.len(),
        held_out: held_out.len(),
        drawn: all
            .iter()
            .map(|drawn| (drawn.plan.by, Count::of(drawn)))
            .collect(),
        judges,
        neighbours: None,
        nearest: Vec::new(),
        cells: Vec::new(),
        draw_s,
        finished,
        grid: None,
        sheet: None,
    };
    let labels = &parts.painter.dit.config().labels;
    if options.grid {
        let (grid, cells) = sheet::samples(&all, labels)?;
        (evaluation.grid, evaluation.cells) = (Some(grid), cells);
    }
    if let (Some(real), Some(seen)) = (real.first(), seen.first()) {
        let search = Search {
            parts,
            training: &training,
            held_out: &held_out,
            real,
            all: &all,
            seen,
            size: options.settings.size,
        };
        search.run(&mut evaluation, options.sheet, on_progress)?;
    }
    Ok(evaluation)
}

impl Count {
    fn of(drawn: &Drawn) -> Self {
        let judged = drawn.equal().len();
        let wishes = drawn.plan.items.len();
        Self {
            wishes,
            each: judged / wishes.max(1),
            judged,
            matched: drawn.matched().len(),
            drawn: drawn.pictures.len(),
        }
    }
}

/// At most `most` of these pictures, by lot, in their order.
fn chosen(all: Vec<usize>, most: Option<usize>) -> Vec<usize> {
    let Some(most) = most.filter(|&most| most < all.len()) else {
        return all;
    };
    let mut order = Philox::named(0, "training").permutation(all.len());
    order.truncate(most);
    order.sort_unstable();
    order.into_iter().map(|place| all[place]).collect()
}

fn check_fewest(what: &str, found: usize) -> anyhow::Result<()> {
    if found < FEWEST {
        bail!("--distances: found {found} {what}, expected at least {FEWEST}, or --distances 0");
    }
    Ok(())
}

/// What is drawn for each kind of wish that is asked for, or that model and set have.
fn plans(parts: &Parts<'_>, options: &Options, held_out: usize) -> anyhow::Result<Vec<Plan>> {
    let Parts {
        painter,
        model,
        labellings,
        ..
    } = parts;
    let set = &labellings.set;
    let labels = &painter.dit.config().labels;
    let labelling = match labels.is_empty() {
        true => None,
        false => Some(&labellings.all[labellings.find(labels, model)?]),
    };
    let reads = painter.text.is_some();
    let captions = |own| Plan::by_caption(set, own, options.per_caption, options.matched != Some(0));
    let has_captions = reads && !captions(None).items.is_empty();
    if labelling.is_none() && !reads {
        bail!("{model}: found a model without classes that reads no text, expected one of them to steer it");
    }
    let asked = match options.by.is_empty() {
        false => options.by.clone(),
        true => [(By::Class, labelling.is_some()), (By::Text, has_captions)]
            .into_iter()
            .filter_map(|(by, there)| there.then_some(by))
            .collect(),
    };
    let nothing = "found no held-out captions that training pictures have not, expected some";
    let mut plans: Vec<Plan> = Vec::new();
    for by in asked {
        if plans.iter().any(|plan| plan.by == by) {
            continue;
        }
        if by != By::Class && !reads {
            bail!("--by {}: the model reads no text", by.name());
        }
        let plan = match (by, labelling) {
            (By::Class | By::Both, None) => bail!("--by {}: the model has no classes", by.name()),
            (By::Class, Some(own)) => {
                let matched = options.matched.unwrap_or(held_out.min(MATCHED));
                Plan::by_class(set, own, options.samples, matched)
            }
            (By::Text, _) => captions(None),
            (By::Both, own) => captions(own),
        };
        if plan.items.is_empty() {
            bail!("--set: {}: {nothing}", set.name());
        }
        let matched: usize = plan.items.iter().map(|item| item.matched).sum();
        if matched > 0 {
            check_fewest("pictures to draw", matched)?;
        }
        plans.push(plan);
    }
    if plans.is_empty() {
        bail!("--set: {}: {nothing}", set.name());
    }
    Ok(plans)
}

/// All pictures have to fit into memory.
fn check_bytes(parts: &Parts<'_>, options: &Options, plans: &[Plan], real: usize) -> anyhow::Result<()> {
    let [height, width] = options.settings.size;
    let each = height.saturating_mul(width).saturating_mul(3);
    let drawn = plans.iter().map(Plan::count).fold(0, usize::saturating_add);
    for (option, count, bytes) in [
        ("--samples", drawn, each),
        ("--training", real, each / 3 * parts.painter.channels()),
    ] {
        if count.saturating_mul(bytes) > MOST_BYTES {
            bail!(
                "{option}: found {count} pictures of {width}x{height}, expected at most {MOST_BYTES} bytes of them"
            );
        }
    }
    Ok(())
}

/// Each judge looks at the held-out pictures, and at the training pictures where its features of them are needed.
fn look_at_real(
    parts: &Parts<'_>,
    (training, held_out): (&[usize], &[usize]),
    with_distances: bool,
    cancel: &AtomicBool,
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Vec<Real>> {
    let needs_training = |place: usize| with_distances || place == 0;
    let total: usize = (0..parts.judges.len())
        .map(|place| held_out.len() + if needs_training(place) { training.len() } else { 0 })
        .sum();
    let mut before = 0;
    let mut all = Vec::with_capacity(parts.judges.len());
    for (place, judge) in parts.judges.iter().enumerate() {
        let mut look = |indices: &[usize]| {
            let seen = judge.look_at(&parts.labellings.set, indices, &mut |done| {
                on_progress(Progress {
                    stage: Stage::Real,
                    done: (before + done) as u64,
                    total: total as u64,
                });
                !cancel.load(Ordering::Relaxed)
            })?;
            before += indices.len();
            seen.ok_or_else(|| anyhow!("stopped before anything was drawn"))
        };
        all.push(Real {
            held_out: look(held_out)?,
            training: needs_training(place).then(|| look(training)).transpose()?,
        });
    }
    Ok(all)
}

fn draw(
    parts: &Parts<'_>,
    options: &Options,
    plans: Vec<Plan>,
    cancel: &AtomicBool,
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Vec<Drawn>> {
    let steps = options.settings.steps;
    let total: usize = plans.iter().map(Plan::count).sum::<usize>() * steps;
    let mut before = 0;
    let mut all = Vec::with_capacity(plans.len());
    for plan in plans {
        let count = plan.count();
        all.push(Drawn::of(
            plan,
            &parts.painter,
            &options.settings,
            options.batch,
            &mut |done| {
                on_progress(Progress {
                    stage: Stage::Draw,
                    done: (before + (done * steps as f64) as usize) as u64,
                    total: total as u64,
                });
                !cancel.load(Ordering::Relaxed)
            },
        )?);
        before += count * steps;
    }
    Ok(all)
}

/// What each judge sees of each kind of drawn pictures. What was drawn is judged to the end, even when the user wants to stop.
fn look_at_drawn(
    parts: &Parts<'_>,
    all: &[Drawn],
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<Vec<Vec<Seen>>> {
    let each: usize = all.iter().map(|drawn| drawn.pictures.len()).sum();
    let mut before = 0;
    parts
        .judges
        .iter()
        .map(|judge| {
            all.iter()
                .map(|drawn| {
                    let pictures = &drawn.pictures;
                    let seen = judge.look(
                        pictures.len(),
                        &|number| Ok(pictures[number].clone()),
                        &mut |done| {
                            on_progress(Progress {
                                stage: Stage::Drawn,
                                done: (before + done) as u64,
                                total: (each * parts.judges.len()) as u64,
                            });
                            true
                        },
                    )?;
                    before += pictures.len();
                    seen.context("stopped")
                })
                .collect()
        })
        .collect()
}

/// The figures of a judge.
fn judged(
    parts: &Parts<'_>,
    judge: &Judge,
    real: &Real,
    held_out: &[usize],
    all: &[Drawn],
    seen: &[Seen],
    seed: u64,
) -> anyhow::Result<Judged> {
    let labellings = &parts.labellings.all;
    let labelling = &labellings[judge.labelling];
    let config = judge.model.config();
    let pictures = held_out.iter().zip(&real.held_out.shares);
    let pictures = pictures.filter_map(|(&index, shares)| Some((labelling.of[index]?, shares.as_slice())));
    let Some(accuracy) = Accuracy::of(&config.labels, pictures, seed) else {
        bail!("--set: {}: no held-out picture has a class", labelling.name);
    };
    // The judge's class of each class of the model; no accuracy where one has none.
    let labels = &parts.painter.dit.config().labels;
    let classes: Option<Vec<usize>> = match labels.is_empty() {
        true => None,
        false => {
            let own = &labellings[parts.labellings.find(labels, &parts.model)?];
            own.within(labelling).into_iter().collect()
        }
    };
    let shuffled = |points: &Points, name: &str| Shuffled::of(points, seed, name);
    let training = real
        .training
        .as_ref()
        .map(|seen| shuffled(&seen.features, "distances/training"));
    let held_out = shuffled(&real.held_out.features, "distances/held out");
    let mut by = BTreeMap::new();
    for (drawn, seen) in all.iter().zip(seen) {
        let truth = |number: usize| {
            let item = drawn.item(number);
            match item.picture {
                Some(index) => labelling.of[index],
                None => Some(classes.as_ref()?[item.wish.class?]),
            }
        };
        let equal = drawn.equal();
        let pictures = equal
            .iter()
            .filter_map(|&number| Some((truth(number)?, seen.shares[number].as_slice())));
        let accuracy = Accuracy::of(&config.labels, pictures, seed);
        let matched = drawn.matched();
        let distances = match &training {
            Some(training) if !matched.is_empty() => {
                let drawn = shuffled(&seen.features.select(&matched), "distances/drawn");
                let found = Distances::of(&drawn, training, &held_out);
                Some(found.with_context(|| judge.folder.display().to_string())?)
            }
            _ => None,
        };
        by.insert(drawn.plan.by, OfDrawn { accuracy, distances });
    }
    Ok(Judged {
        judge: judge.folder.clone(),
        set: labelling.name.clone(),
        parameters: judge.model.parameters(),
        image_size: config.image_size,
        features: FeatureName {
            layer: LAYER,
            width: config.hidden_size,
        },
        real: accuracy,
        by,
    })
}

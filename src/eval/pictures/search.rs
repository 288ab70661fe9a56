//! The search for nearest training pictures, by features and by pixels.

use anyhow::Context as _;
use fulgur_benchmark::metrics::points::{Near, nearest};
use fulgur_datasets::augment::View;
use fulgur_datasets::media::Picture;
use rayon::prelude::*;

use super::judge::Seen;
use super::neighbours::{self, Neighbours, SHOWN, Yardstick};
use super::run::{Evaluation, Parts, Progress, Real, Stage};
use super::samples::{By, Drawn};
use super::sheet::{self, Neighbour, Row};

/// Pictures that are looked for at once.
const TOGETHER: usize = 32;
/// Rows of a sheet of neighbours: the nearest by features, by pixels, and evenly chosen ones.
const ROWS: usize = 8;

/// What the search for neighbours goes through.
pub(super) struct Search<'a> {
    pub(super) parts: &'a Parts<'a>,
    pub(super) training: &'a [usize],
    pub(super) held_out: &'a [usize],
    /// As the first judge has seen them.
    pub(super) real: &'a Real,
    pub(super) all: &'a [Drawn],
    pub(super) seen: &'a [Seen],
    pub(super) size: [usize; 2],
}

impl Search<'_> {
    /// Bytes of real pictures as the model learns them.
    fn real_bytes(&self, indices: &[usize]) -> anyhow::Result<Vec<Vec<u8>>> {
        let set = &self.parts.labellings.set;
        indices
            .par_iter()
            .map(|&index| Ok(self.bytes(View::filled(self.size).middle(&set.picture(index)?)?)))
            .collect()
    }

    fn bytes(&self, picture: Picture) -> Vec<u8> {
        neighbours::bytes(picture, self.parts.painter.channels())
    }

    /// Fills in how near drawn pictures come to training pictures, and the sheet of them where it is wanted.
    pub(super) fn run(
        &self,
        evaluation: &mut Evaluation,
        with_sheet: bool,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<()> {
        let Some(training) = &self.real.training else {
            return Ok(());
        };
        let among = self.real_bytes(self.training)?;
        let held_out = self.real_bytes(self.held_out)?;
        let drawn: Vec<Vec<Vec<u8>>> = self
            .all
            .iter()
            .map(|drawn| {
                let pictures = drawn.pictures.par_iter();
                pictures.map(|picture| self.bytes(picture.clone())).collect()
            })
            .collect();
        let total = held_out.len() + drawn.iter().map(Vec::len).sum::<usize>();
        let mut done = 0;
        let mut pixels = |queries: &[Vec<u8>]| -> Vec<Vec<Near>> {
            let mut found = Vec::with_capacity(queries.len());
            for queries in queries.chunks(TOGETHER) {
                let queries: Vec<&[u8]> = queries.iter().map(Vec::as_slice).collect();
                found.extend(neighbours::by_pixels(&queries, &among));
                done += queries.len();
                on_progress(Progress {
                    stage: Stage::Neighbours,
                    done: done as u64,
                    total: total as u64,
                });
            }
            found
        };
        let real = [
            nearest(&self.real.held_out.features, &training.features, 1)?,
            pixels(&held_out),
        ];
        let found: Vec<[Vec<Vec<Near>>; 2]> = self
            .seen
            .iter()
            .zip(&drawn)
            .map(|(seen, bytes)| Ok([nearest(&seen.features, &training.features, SHOWN)?, pixels(bytes)]))
            .collect::<anyhow::Result<_>>()?;
        // In the proportions of real pictures where there are such, for the yardstick is of real ones.
        let yardstick = |which: usize| {
            let first = |near: &[Near]| near.first().map(|near| near.distance);
            let all: Vec<(By, Vec<f64>)> = (self.all.iter().zip(&found))
                .map(|(drawn, found)| {
                    let matched = drawn.matched();
                    let numbers = if matched.is_empty() {
                        drawn.equal()
                    } else {
                        matched
                    };
                    let distances = numbers
                        .into_iter()
                        .filter_map(|number| first(&found[which][number]));
                    (drawn.plan.by, distances.collect())
                })
                .collect();
            let held_out: Vec<f64> = real[which].iter().filter_map(|near| first(near)).collect();
            Yardstick::of(&held_out, &all)
        };
        if let (Some(features), Some(pixels)) = (yardstick(0), yardstick(1)) {
            evaluation.neighbours = Some(Neighbours::of(self.training.len(), features, pixels));
        }
        if with_sheet {
            evaluation.nearest = self.rows(&found);
            let picture = sheet::neighbours(
                &evaluation.nearest,
                &|row| {
                    let drawn = self.all.iter().find(|drawn| drawn.plan.by == row.by);
                    let picture = drawn.and_then(|drawn| drawn.pictures.get(row.number));
                    picture.cloned().context("a row of no picture")
                },
                &|place| {
                    let picture = self.parts.labellings.set.picture(self.training[place])?;
                    Ok(View::filled(self.size).middle(&picture)?)
                },
            )?;
            evaluation.sheet = Some(picture);
        }
        Ok(())
    }

    /// The drawn pictures that are nearest by features, those by pixels, and evenly chosen ones, each once.
    fn rows(&self, found: &[[Vec<Vec<Near>>; 2]]) -> Vec<Row> {
        let all: Vec<(usize, usize)> = (self.all.iter().enumerate())
            .flat_map(|(kind, drawn)| (0..drawn.pictures.len()).map(move |number| (kind, number)))
            .collect();
        let mut shown: Vec<(usize, usize)> = Vec::with_capacity(3 * ROWS);
        let distance = |which: usize, (kind, number): (usize, usize)| {
            found[kind][which][number]
                .first()
                .map_or(f64::INFINITY, |near| near.distance)
        };
        for which in [0, 1] {
            let mut order = all.clone();
            order.sort_by(|&a, &b| distance(which, a).total_cmp(&distance(which, b)));
            let new: Vec<(usize, usize)> = order.into_iter().filter(|own| !shown.contains(own)).collect();
            shown.extend(new.into_iter().take(ROWS));
        }
        let rest: Vec<(usize, usize)> = all.into_iter().filter(|own| !shown.contains(own)).collect();
        let count = rest.len().min(ROWS);
        shown.extend((0..count).map(|place| rest[place * rest.len() / count]));
        let set = &self.parts.labellings.set;
        let labels = &self.parts.painter.dit.config().labels;
        let row = |(kind, number): (usize, usize)| {
            let drawn = &self.all[kind];
            let (label, prompt) = sheet::wish(drawn, number, labels);
            let near = |which: usize| {
                let near = found[kind][which][number].iter();
                near.map(|near| Neighbour::of(set, self.training[near.index], near.index, near.distance))
                    .collect()
            };
            Row {
                by: drawn.plan.by,
                number,
                label,
                prompt,
                features: near(0),
                pixels: near(1),
            }
        };
        shown.into_iter().map(row).collect()
    }
}

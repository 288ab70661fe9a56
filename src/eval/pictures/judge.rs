//! A classifier that judges: what it says about pictures, and its features of them.

use std::path::{Path, PathBuf};

use anyhow::bail;
use candle_core::Device;
use fulgur_benchmark::metrics::points::Points;
use fulgur_datasets::labelled::Labelled;
use fulgur_datasets::media::Picture;
use rayon::prelude::*;

use super::labellings::Labellings;
use crate::classify::prepare::{Fit, fit};
use crate::classify::{Examined, Model};

/// The layer that features come from.
pub(super) const LAYER: &str = "norm of the mean of all tokens, before the head";

/// A classifier whose classes are those of a labelling.
#[derive(Debug)]
pub struct Judge {
    pub(super) folder: PathBuf,
    pub(super) model: Model,
    /// Place of its labelling.
    pub(super) labelling: usize,
}

/// What a judge has seen of some pictures.
#[derive(Debug)]
pub(super) struct Seen {
    /// Shares of the classes, by picture.
    pub(super) shares: Vec<Vec<f32>>,
    /// Features, a row a picture.
    pub(super) features: Points,
}

impl Judge {
    /// Loads the classifier in `folder` onto `device` and finds its classes among those of the set.
    ///
    /// # Errors
    /// The folder holds no classifier, or one of other classes.
    pub fn load(folder: &Path, labellings: &Labellings, device: &Device) -> anyhow::Result<Self> {
        let model = Model::load(folder, device)?;
        let labelling = labellings.find(&model.config().labels, &folder.display().to_string())?;
        Ok(Self {
            folder: folder.to_owned(),
            model,
            labelling,
        })
    }

    /// Looks at `count` pictures as in its own evaluation, of its size and channels. `on_picture` hears how many are done, and
    /// ends the work with `None` by returning false.
    pub(super) fn look(
        &self,
        count: usize,
        picture: &(dyn Fn(usize) -> anyhow::Result<Picture> + Sync),
        on_picture: &mut dyn FnMut(usize) -> bool,
    ) -> anyhow::Result<Option<Seen>> {
        let config = self.model.config();
        let [height, width] = config.image_size;
        let mut shares = Vec::with_capacity(count);
        let mut features = Vec::with_capacity(count * config.hidden_size);
        let together = Model::together(height, width);
        for first in (0..count).step_by(together) {
            let fitted: Vec<Picture> = (first..count.min(first + together))
                .into_par_iter()
                .map(|index| Ok(fit(&picture(index)?, config, Fit::Model)?))
                .collect::<anyhow::Result<_>>()?;
            let Examined {
                shares: said,
                features: rows,
            } = self.model.examine(&fitted)?;
            if said.iter().flatten().any(|share| !share.is_finite()) {
                bail!(
                    "{}: found shares of classes that are not finite",
                    self.folder.display()
                );
            }
            shares.extend(said);
            features.extend(rows.into_iter().flatten().map(f64::from));
            if !on_picture(shares.len()) {
                return Ok(None);
            }
        }
        let features = Points::new(config.hidden_size, features);
        let features = features.map_err(|error| anyhow::anyhow!("{}: {error}", self.folder.display()))?;
        Ok(Some(Seen { shares, features }))
    }

    /// Looks at these pictures of a set.
    pub(super) fn look_at(
        &self,
        set: &Labelled,
        indices: &[usize],
        on_picture: &mut dyn FnMut(usize) -> bool,
    ) -> anyhow::Result<Option<Seen>> {
        self.look(
            indices.len(),
            &|place| Ok(set.picture(indices[place])?),
            on_picture,
        )
    }
}

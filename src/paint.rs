//! Pictures out of noise, by class and by text: a [`Dit`] with its text encoder and codec, guidance, and grids.

mod model;
mod pixels;

use anyhow::{Context as _, bail};
use candle_core::Tensor;
use fulgur_datasets::media::Picture;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::diffusion::{Sampler, Step};
use fulgur_lightnet::vision::{Dit, Wanted};
use fulgur_tavdiffusion::codec::PictureCodec;
use fulgur_tavdiffusion::text::TextModel;

pub use model::{CODEC, Model, TEXT_ENCODER};
pub use pixels::grid;
use pixels::{pictures, pixels};

/// Pictures that go through the network at once.
const TOGETHER: usize = 64;

/// What a picture shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its class; none leaves that open.
    pub class: Option<usize>,
    /// What it shall show; empty leaves that open.
    pub prompt: String,
}

/// How it is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Steps of the sampler.
    pub steps: usize,
    /// Strength of class and text: 1 follows the model alone, more pushes away from what is open.
    pub guidance: f64,
    /// Bends the times of the flow towards noise; 1 is uniform.
    pub shift: f64,
    /// Seed of the noise. Picture i of a call has the same noise whatever is drawn beside it.
    pub seed: u64,
    /// Height and width in pixels: multiples of [`Painter::step`].
    pub size: [usize; 2],
}

/// A picture to start from, and how much of it may change: 0 keeps it, 1 starts from noise alone.
#[derive(Clone, Debug)]
pub struct Start {
    /// Of the size that is made.
    pub picture: Picture,
    /// 0 to 1.
    pub strength: f64,
}

/// A network with what its texts need.
#[derive(Clone, Copy, Debug)]
pub struct Painter<'a> {
    /// The network.
    pub dit: &'a Dit,
    /// The encoder of its texts, of a network that reads some.
    pub text: Option<&'a TextModel>,
    /// The codec of its latents, of a network that does not draw pixels.
    pub codec: Option<&'a PictureCodec>,
}

/// Classes and texts of a batch, on the device.
struct Conditions {
    classes: Option<Ids>,
    text: Option<(Tensor, Tensor)>,
}

impl Conditions {
    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            classes: self.classes.as_ref(),
            text: self.text.as_ref().map(|(states, mask)| (states, mask)),
        }
    }
}

impl Painter<'_> {
    /// Height and width in pixels that the model is made for.
    #[must_use]
    pub fn size(&self) -> [usize; 2] {
        self.dit.config().image_size.map(|side| side * self.factor())
    }

    /// What the sides of a picture are multiples of: a patch, in pixels.
    #[must_use]
    pub fn step(&self) -> usize {
        self.dit.config().patch_size * self.factor()
    }

    /// Channels of the pictures: 1 for grey, 3 for colours.
    #[must_use]
    pub fn channels(&self) -> usize {
        match self.codec {
            Some(_) => PictureCodec::COLOURS,
            None => self.dit.config().num_channels,
        }
    }

    /// Pixels of a side for one value that the network sees.
    fn factor(&self) -> usize {
        self.codec.map_or(1, PictureCodec::factor)
    }

    /// Draws a picture for each wish. `on_step` is called after each step of each group and ends the work with `None` by
    /// returning false; its steps count all groups.
    ///
    /// # Errors
    /// Settings out of range, wishes that the model does not know, or a failing operation.
    pub fn paint(
        &self,
        wishes: &[Wish],
        settings: &Settings,
        start: Option<&Start>,
        on_step: &mut dyn FnMut(Step) -> bool,
    ) -> anyhow::Result<Option<Vec<Picture>>> {
        self.check(wishes, settings, start)?;
        let groups = wishes.len().div_ceil(TOGETHER);
        let mut pictures = Vec::with_capacity(wishes.len());
        for (group, wishes) in wishes.chunks(TOGETHER).enumerate() {
            let first = group * TOGETHER;
            let drawn = self.group(wishes, first, settings, start, &mut |step| {
                on_step(Step {
                    done: group * step.total + step.done,
                    total: groups * step.total,
                })
            })?;
            match drawn {
                Some(drawn) => pictures.extend(drawn),
                None => return Ok(None),
            }
        }
        Ok(Some(pictures))
    }

    pub(crate) fn check(
        &self,
        wishes: &[Wish],
        settings: &Settings,
        start: Option<&Start>,
    ) -> anyhow::Result<()> {
        let config = self.dit.config();
        let step = self.step();
        let [height, width] = settings.size;
        if [height, width]
            .iter()
            .any(|&side| !(1..=1 << 14).contains(&side) || !side.is_multiple_of(step))
        {
            bail!("size is {width}x{height}, expected multiples of {step} up to 16384");
        }
        if !(1..=1000).contains(&settings.steps) {
            bail!("steps is {}, expected 1 to 1000", settings.steps);
        }
        for (name, value) in [("guidance", settings.guidance), ("shift", settings.shift)] {
            if !value.is_finite() || value < 0.0 {
                bail!("{name} is {value}, expected 0 or more");
            }
        }
        if config.codec_factor.is_some() != self.codec.is_some() {
            bail!("a model of latents and its codec, expected both or neither");
        }
        if !matches!(self.channels(), 1 | 3) {
            bail!(
                "num_channels is {}, expected 1 or 3 of a model that draws pixels",
                config.num_channels
            );
        }
        for wish in wishes {
            if wish.class.is_some_and(|class| class >= config.labels.len()) {
                bail!(
                    "class is {}, expected less than {}",
                    wish.class.unwrap_or_default(),
                    config.labels.len()
                );
            }
            if self.text.is_none() && !wish.prompt.is_empty() {
                bail!("prompt: found a text, but the model reads none");
            }
        }
        if let Some(Start { picture, strength }) = start {
            if !(*strength > 0.0 && *strength <= 1.0) {
                bail!("strength is {strength}, expected above 0 and at most 1");
            }
            if [picture.height, picture.width] != settings.size {
                bail!(
                    "the picture to start from is {}x{}, expected {width}x{height}",
                    picture.width,
                    picture.height
                );
            }
        }
        Ok(())
    }

    /// Draws pictures `first` and following of a call at once.
    pub(crate) fn group(
        &self,
        wishes: &[Wish],
        first: usize,
        settings: &Settings,
        start: Option<&Start>,
        on_step: &mut dyn FnMut(Step) -> bool,
    ) -> anyhow::Result<Option<Vec<Picture>>> {
        let config = self.dit.config();
        let device = self.dit.device();
        let [height, width] = settings.size.map(|side| side / self.factor());
        let channels = config.num_channels;
        let values = height * width * channels;
        let noise: Vec<f32> = (first..first + wishes.len())
            .flat_map(|i| Philox::named(settings.seed, &format!("picture/{i}")).normals(values))
            .collect();
        let noise = Tensor::from_vec(noise, (wishes.len(), height, width, channels), device)?;
        let guided = settings.guidance != 1.0;
        let conditions = self.conditions(wishes, guided)?;
        let predict = |x: &Tensor, time: f64| self.predict(x, time, &conditions, settings.guidance);
        let sampler = Sampler {
            objective: config.objective,
            steps: settings.steps,
            shift: settings.shift,
        };
        let done = match start {
            None => sampler.run(&noise, predict, on_step)?,
            Some(Start { picture, strength }) => {
                let clean = self.coded(picture)?.repeat((wishes.len(), 1, 1, 1))?;
                sampler.run_from(&clean, &noise, *strength, predict, on_step)?
            }
        };
        let Some(x) = done else { return Ok(None) };
        let x = match self.codec {
            Some(codec) => codec.decode(&x)?,
            None => x,
        };
        if !x.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            bail!("the model drew values that are not finite");
        }
        pictures(&x).map(Some)
    }

    /// A picture as the network sees it, `[1, h, w, C]`.
    fn coded(&self, picture: &Picture) -> anyhow::Result<Tensor> {
        let channels = self.channels();
        let shape = (1, picture.height, picture.width, channels);
        let x = Tensor::from_vec(pixels(picture, channels), shape, self.dit.device())?;
        Ok(match self.codec {
            Some(codec) => codec.encode(&x)?,
            None => x,
        })
    }

    /// The prediction with guidance: of a batch that has what is wanted in its first half, and in its second what is open.
    fn predict(
        &self,
        x: &Tensor,
        time: f64,
        conditions: &Conditions,
        guidance: f64,
    ) -> candle_core::Result<Tensor> {
        let batch = x.dim(0)?;
        let times = |count: usize| Tensor::full(time as f32, count, x.device());
        if guidance == 1.0 {
            return self.dit.forward(x, &times(batch)?, &conditions.wanted());
        }
        let both = Tensor::cat(&[x, x], 0)?;
        let both = self
            .dit
            .forward(&both, &times(2 * batch)?, &conditions.wanted())?;
        let (with, without) = (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?);
        &without + ((with - &without)? * guidance)?
    }

    fn conditions(&self, wishes: &[Wish], guided: bool) -> anyhow::Result<Conditions> {
        let config = self.dit.config();
        let open = vec![Wish::default(); if guided { wishes.len() } else { 0 }];
        let all: Vec<&Wish> = wishes.iter().chain(&open).collect();
        let classes = (!config.labels.is_empty())
            .then(|| {
                let none = self.dit.no_class();
                let ids: Vec<u32> = all
                    .iter()
                    .map(|wish| wish.class.map_or(none, |class| class as u32))
                    .collect();
                Ids::new(&ids, &[ids.len()], none as usize + 1)
            })
            .transpose()?;
        let text = self
            .text
            .map(|model| {
                let prompts: Vec<&str> = all.iter().map(|wish| wish.prompt.as_str()).collect();
                let found = model.encode(&prompts).context("prompt")?;
                Ok::<_, anyhow::Error>((found.states, found.mask))
            })
            .transpose()?;
        Ok(Conditions { classes, text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use fulgur_lightnet::params::Params;
    use fulgur_lightnet::vision::{DitConfig, DitSize};

    fn dit() -> Dit {
        let config = DitConfig {
            image_size: [8, 8],
            num_channels: 1,
            hidden_size: 16,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 16,
            ..DitConfig::of(DitSize::Small, vec!["a".into(), "b".into()])
        };
        let params = Params::random(1, &Device::Cpu);
        let dit = Dit::new(&config, DType::F32, &params.builder()).unwrap();
        for (name, var) in params.vars() {
            let noise = Philox::named(2, &name).normals(var.elem_count());
            let noise = Tensor::from_vec(noise, var.dims(), &Device::Cpu).unwrap();
            var.set(&(var.as_tensor() + (noise * 0.1).unwrap()).unwrap())
                .unwrap();
        }
        dit
    }

    fn settings() -> Settings {
        Settings {
            steps: 3,
            guidance: 2.0,
            shift: 1.0,
            seed: 4,
            size: [8, 12],
        }
    }

    fn wish(class: usize) -> Wish {
        Wish {
            class: Some(class),
            ..Wish::default()
        }
    }

    #[test]
    fn a_picture_depends_on_its_wish_and_its_number_alone() {
        let dit = dit();
        let painter = Painter {
            dit: &dit,
            text: None,
            codec: None,
        };
        let paint = |wishes: &[Wish], settings: &Settings| {
            let mut on_step = |_: Step| true;
            let pictures = painter.paint(wishes, settings, None, &mut on_step).unwrap();
            pictures.unwrap()
        };
        let both = paint(&[wish(0), wish(1)], &settings());
        let alone = paint(&[wish(0)], &settings());
        assert_eq!((both[0].width, both[0].height), (12, 8));
        let far = |a: &Picture, b: &Picture| {
            let pairs = a.pixels.iter().zip(&b.pixels);
            pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
        };
        assert!(far(&both[0], &alone[0]) <= 1);
        assert!(far(&paint(&[wish(1)], &settings())[0], &alone[0]) > 1);
        let seeded = Settings {
            seed: 5,
            ..settings()
        };
        assert!(far(&paint(&[wish(0)], &seeded)[0], &alone[0]) > 1);
    }

    /// A small strength leaves a picture nearly as it is, the whole one forgets it.
    #[test]
    fn strength_says_how_much_of_a_picture_may_change() {
        let dit = dit();
        let painter = Painter {
            dit: &dit,
            text: None,
            codec: None,
        };
        let bright = Picture::new(vec![230; 8 * 12 * 3], 12, 8, 3).unwrap();
        let plain = Settings {
            steps: 20,
            guidance: 1.0,
            ..settings()
        };
        let change = |strength: f64| {
            let start = Start {
                picture: bright.clone(),
                strength,
            };
            let made = painter
                .paint(&[wish(0)], &plain, Some(&start), &mut |_| true)
                .unwrap()
                .unwrap();
            let sum: f64 = made[0]
                .pixels
                .iter()
                .map(|&byte| (f64::from(byte) - 230.0).abs())
                .sum();
            sum / made[0].pixels.len() as f64
        };
        let (little, all) = (change(0.05), change(1.0));
        assert!(little < 15.0 && all > 3.0 * little, "{little} {all}");
    }

    #[test]
    fn what_cannot_be_painted_is_refused_in_a_line() {
        let dit = dit();
        let painter = Painter {
            dit: &dit,
            text: None,
            codec: None,
        };
        let line = |wish: Wish, settings: Settings| {
            let painted = painter.paint(&[wish], &settings, None, &mut |_| true);
            painted.unwrap_err().to_string()
        };
        let spoken = Wish {
            prompt: "a cat".into(),
            ..Wish::default()
        };
        for (found, words) in [
            (line(wish(2), settings()), "class is 2, expected less than 2"),
            (
                line(spoken, settings()),
                "prompt: found a text, but the model reads none",
            ),
            (
                line(
                    wish(0),
                    Settings {
                        size: [8, 9],
                        ..settings()
                    },
                ),
                "size is 9x8, expected multiples of 2",
            ),
            (
                line(
                    wish(0),
                    Settings {
                        guidance: f64::NAN,
                        ..settings()
                    },
                ),
                "guidance is NaN",
            ),
            (
                line(
                    wish(0),
                    Settings {
                        steps: 0,
                        ..settings()
                    },
                ),
                "steps is 0, expected 1 to 1000",
            ),
        ] {
            assert!(found.starts_with(words), "{found}");
        }
    }
}

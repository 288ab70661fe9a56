//! Pictures out of noise, by class and by text: a [`Dit`] with its text encoder, guidance, and grids.
//!
//! A model folder has `config.json`, `model.safetensors` and, of a model that reads texts, the encoder in `text_encoder`.

use std::path::Path;

use anyhow::{Context as _, bail};
use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::Picture;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::diffusion::{Sampler, Step};
use fulgur_lightnet::vision::{Dit, Wanted};
use fulgur_tavdiffusion::text::TextModel;
use image::RgbImage;
use image::imageops::{self, FilterType};

/// Folder of the text encoder within a model's.
pub const TEXT_ENCODER: &str = "text_encoder";
/// Pixels between the pictures of a grid.
const GAP: usize = 2;
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
    /// Height and width: multiples of the model's patch.
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
}

/// What a folder holds.
#[derive(Debug)]
pub struct Model {
    dit: Dit,
    text: Option<TextModel>,
}

impl Model {
    /// Reads a folder onto `device`.
    ///
    /// # Errors
    /// A file is missing, damaged or of another model.
    pub fn load(dir: &Path, device: &Device) -> anyhow::Result<Self> {
        let compute = if device.is_cuda() { DType::BF16 } else { DType::F32 };
        let dit = Dit::load(dir, compute, device)?;
        let text = dit.config().text_dim.map(|width| {
            let folder = dir.join(TEXT_ENCODER);
            let text = TextModel::load(&folder, device)?;
            let found = text.encoder().config().hidden_size;
            if found != width {
                bail!(
                    "{}: hidden_size is {found}, expected {width}, the text_dim of the model",
                    folder.display()
                );
            }
            Ok(text)
        });
        Ok(Self {
            dit,
            text: text.transpose()?,
        })
    }

    /// What draws.
    pub fn painter(&self) -> Painter<'_> {
        Painter {
            dit: &self.dit,
            text: self.text.as_ref(),
        }
    }

    /// The class called `name`, or of that number.
    ///
    /// # Errors
    /// There is none.
    pub fn class(&self, name: &str) -> anyhow::Result<usize> {
        let labels = &self.dit.config().labels;
        if let Some(index) = labels.iter().position(|label| label == name) {
            return Ok(index);
        }
        match name.parse::<usize>() {
            Ok(index) if index < labels.len() => Ok(index),
            _ if labels.is_empty() => bail!("class: found {name:?}, expected none: the model has no classes"),
            _ => {
                let some: Vec<&str> = labels.iter().map(String::as_str).take(12).collect();
                let more = if labels.len() > some.len() { ", .." } else { "" };
                bail!(
                    "class: found {name:?}, expected 0 to {} or one of {}{more}",
                    labels.len() - 1,
                    some.join(", ")
                )
            }
        }
    }
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
        let patch = config.patch_size;
        let [height, width] = settings.size;
        if [height, width]
            .iter()
            .any(|&side| !(1..=1 << 14).contains(&side) || !side.is_multiple_of(patch))
        {
            bail!("size is {width}x{height}, expected multiples of {patch} up to 16384");
        }
        if !(1..=1000).contains(&settings.steps) {
            bail!("steps is {}, expected 1 to 1000", settings.steps);
        }
        for (name, value) in [("guidance", settings.guidance), ("shift", settings.shift)] {
            if !value.is_finite() || value < 0.0 {
                bail!("{name} is {value}, expected 0 or more");
            }
        }
        if !matches!(config.num_channels, 1 | 3) {
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
        let [height, width] = settings.size;
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
                let clean =
                    Tensor::from_vec(pixels(picture, channels), (1, height, width, channels), device)?
                        .repeat((wishes.len(), 1, 1, 1))?;
                sampler.run_from(&clean, &noise, *strength, predict, on_step)?
            }
        };
        if let Some(x) = &done
            && !x.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite()
        {
            bail!("the model drew values that are not finite");
        }
        done.map(|x| pictures(&x)).transpose()
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

/// Values of -1 to 1 of an RGB picture, channels last; of one channel the mean of the colours.
pub(crate) fn pixels(picture: &Picture, channels: usize) -> Vec<f32> {
    let value = |byte: f32| byte / 127.5 - 1.0;
    let colours = picture.pixels.chunks_exact(picture.channels);
    match channels {
        1 => colours
            .map(|pixel| {
                let sum: f32 = pixel[..3].iter().map(|&byte| f32::from(byte)).sum();
                value(sum / 3.0)
            })
            .collect(),
        _ => colours
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]].map(|byte| value(f32::from(byte))))
            .collect(),
    }
}

/// The middle of an RGB picture, resized until it fills the height and width.
///
/// # Errors
/// It is no RGB picture.
pub fn fitted(picture: &Picture, size: [usize; 2]) -> anyhow::Result<Picture> {
    let [height, width] = size;
    if (picture.height, picture.width, picture.channels) == (height, width, 3) {
        return Ok(picture.clone());
    }
    let (w, h) = (picture.width as u32, picture.height as u32);
    let Some(rgb) = RgbImage::from_raw(w, h, picture.pixels.clone()) else {
        bail!(
            "a picture of {w}x{h} with {} channels, expected 3",
            picture.channels
        );
    };
    let (wide, high) = (width as u32, height as u32);
    // The largest part of the picture that has the sides' ratio.
    let scale = (f64::from(w) / f64::from(wide)).min(f64::from(h) / f64::from(high));
    let part = |side: u32, most: u32| ((f64::from(side) * scale).round() as u32).clamp(1, most);
    let (part_w, part_h) = (part(wide, w), part(high, h));
    let middle = imageops::crop_imm(&rgb, (w - part_w) / 2, (h - part_h) / 2, part_w, part_h).to_image();
    let resized = imageops::resize(&middle, wide, high, FilterType::CatmullRom);
    Ok(Picture::new(resized.into_raw(), width, height, 3)?)
}

/// RGB pictures of values `[B, H, W, 1 or 3]`.
fn pictures(x: &Tensor) -> anyhow::Result<Vec<Picture>> {
    let (batch, height, width, channels) = x.dims4()?;
    let bytes = x
        .affine(127.5, 127.5)?
        .round()?
        .clamp(0f32, 255f32)?
        .to_dtype(DType::U8)?;
    (0..batch)
        .map(|i| {
            let bytes: Vec<u8> = bytes.get(i)?.flatten_all()?.to_vec1()?;
            let rgb = match channels {
                1 => bytes.into_iter().flat_map(|grey| [grey; 3]).collect(),
                _ => bytes,
            };
            Ok(Picture::new(rgb, width, height, 3)?)
        })
        .collect()
}

/// RGB pictures of one size in rows of `columns`, on white.
///
/// # Errors
/// No pictures, no columns, or pictures of several sizes.
pub fn grid(pictures: &[Picture], columns: usize) -> anyhow::Result<Picture> {
    let Some(first) = pictures.first().filter(|_| columns > 0) else {
        bail!("a grid of {} pictures in {columns} columns", pictures.len());
    };
    let (w, h) = (first.width, first.height);
    if pictures
        .iter()
        .any(|p| (p.width, p.height, p.channels) != (w, h, 3))
    {
        bail!("a grid of pictures of several sizes");
    }
    let rows = pictures.len().div_ceil(columns);
    let side = |count: usize, length: usize| count * length + (count - 1) * GAP;
    let (width, height) = (side(columns, w), side(rows, h));
    let mut pixels = vec![255u8; width * height * 3];
    for (i, picture) in pictures.iter().enumerate() {
        let (left, top) = ((i % columns) * (w + GAP), (i / columns) * (h + GAP));
        for (y, row) in picture.pixels.chunks_exact(3 * w).enumerate() {
            let at = 3 * ((top + y) * width + left);
            pixels[at..at + 3 * w].copy_from_slice(row);
        }
    }
    Ok(Picture::new(pixels, width, height, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
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

    #[test]
    fn the_middle_of_a_picture_fills_the_size() {
        // Three stripes side by side: a square holds the one in the middle.
        let pixels: Vec<u8> = (0..30 * 90)
            .flat_map(|i| [[10u8, 120, 240][i % 90 / 30]; 3])
            .collect();
        let wide = Picture::new(pixels, 90, 30, 3).unwrap();
        let square = fitted(&wide, [10, 10]).unwrap();
        assert_eq!((square.width, square.height), (10, 10));
        assert!(
            square.pixels.iter().all(|&byte| byte == 120),
            "{:?}",
            &square.pixels[..30]
        );
        assert_eq!(fitted(&wide, [30, 90]).unwrap(), wide);
    }

    #[test]
    fn grids_keep_their_pictures() {
        let one = |value: u8| Picture::new(vec![value; 2 * 3 * 3], 2, 3, 3).unwrap();
        let page = grid(&[one(1), one(2), one(3)], 2).unwrap();
        assert_eq!((page.width, page.height), (6, 8));
        let at = |x: usize, y: usize| page.pixels[3 * (y * page.width + x)];
        assert_eq!(
            [at(0, 0), at(2, 0), at(4, 2), at(1, 5), at(4, 5)],
            [1, 255, 2, 3, 255]
        );
        assert!(grid(&[], 2).is_err());
    }
}

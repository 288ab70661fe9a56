//! From noise to latents of both streams, with classifier-free guidance of its own for each.

use candle_core::{Result, Tensor};
pub use fulgur_lightnet::diffusion::{LinearSchedule, Mixture, Objective, Sampler, Step};

use crate::denoiser::{Denoiser, Latents, TextCondition};

/// Strength of the text: 1 follows the model alone, more pushes away from the negative prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// For the picture.
    pub video: f64,
    /// For the sound.
    pub audio: f64,
}

impl Guidance {
    fn is_off(self) -> bool {
        self.video == 1.0 && self.audio == 1.0
    }
}

/// Texts of a batch of clips, `[B, ..]` each.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// What is wanted.
    pub text: TextCondition,
    /// What to keep away from, in both streams unless the sound has a negative prompt of its own.
    pub negative: TextCondition,
    /// What the sound keeps away from.
    pub audio_negative: Option<TextCondition>,
}

/// Denoises `noise`; `on_step` is called after each step and ends the loop with `None` by returning false.
///
/// # Errors
/// A failing operation.
pub fn sample(
    sampler: &Sampler,
    denoiser: &dyn Denoiser,
    noise: &Latents,
    prompts: &Prompts,
    guidance: Guidance,
    on_step: &mut dyn FnMut(Step) -> bool,
) -> Result<Option<Latents>> {
    let times = sampler.times();
    let guided = Guided::new(prompts, guidance)?;
    let mut x = noise.clone();
    for (k, &time) in times.iter().enumerate().take(sampler.steps) {
        // Detached: under training weights the graph of every step would be kept to the last one.
        let prediction = guided
            .predict(denoiser, &x, time)?
            .map(|prediction| Ok(prediction.detach()))?;
        x = x.zip(&prediction, |x, prediction| sampler.advance(x, prediction, k))?;
        let step = Step {
            done: k + 1,
            total: sampler.steps,
        };
        if !on_step(step) {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// All texts of a step in one batch: the prompt and, where guidance is on, what to keep away from.
struct Guided {
    texts: TextCondition,
    /// Texts in the batch: 1 without guidance, 2 when both streams share a negative prompt, else 3.
    copies: usize,
    guidance: Guidance,
}

impl Guided {
    fn new(prompts: &Prompts, guidance: Guidance) -> Result<Self> {
        let (texts, copies) = if guidance.is_off() {
            (prompts.text.clone(), 1)
        } else {
            let pair = TextCondition::cat(&prompts.text, &prompts.negative)?;
            match &prompts.audio_negative {
                None => (pair, 2),
                Some(audio) => (TextCondition::cat(&pair, audio)?, 3),
            }
        };
        Ok(Self {
            texts,
            copies,
            guidance,
        })
    }

    fn predict(&self, denoiser: &dyn Denoiser, x: &Latents, time: f64) -> Result<Latents> {
        let batch = x.video.dim(0)?;
        let times = Tensor::full(time as f32, self.copies * batch, x.video.device())?;
        let repeated = x.map(|x| Tensor::cat(&vec![x; self.copies], 0))?;
        let prediction = denoiser.predict(&repeated, &times, &self.texts)?;
        if self.copies == 1 {
            return Ok(prediction);
        }
        let part = |x: &Tensor, copy: usize| x.narrow(0, copy * batch, batch);
        let mix = |x: &Tensor, negative: usize, scale: f64| {
            let without = part(x, negative)?;
            &without + ((part(x, 0)? - &without)? * scale)?
        };
        Ok(Latents {
            video: mix(&prediction.video, 1, self.guidance.video)?,
            audio: mix(&prediction.audio, self.copies - 1, self.guidance.audio)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::{LatentShape, noise};
    use candle_core::{DType, Device, Var};

    /// Knows the clean latents and answers as a perfect network would.
    struct Oracle {
        clean: Latents,
        objective: Objective,
    }

    impl Denoiser for Oracle {
        fn predict(&self, x: &Latents, time: &Tensor, _: &TextCondition) -> Result<Latents> {
            let t = f64::from(time.to_vec1::<f32>()?[0]);
            x.zip(&self.clean, |x, clean| match self.objective {
                // Guidance repeats the batch; the clean latents stay single.
                Objective::Flow => x.broadcast_sub(clean)? / t,
                Objective::Ddpm => {
                    let step = fulgur_lightnet::diffusion::ddpm_step(t as f32) as isize;
                    let alpha = LinearSchedule::default().alpha_bar(step);
                    (x - (clean * alpha.sqrt())?)? / (1.0 - alpha).sqrt()
                }
            })
        }

        fn device(&self) -> &Device {
            &Device::Cpu
        }
    }

    fn far(a: &Latents, b: &Latents) -> Result<f32> {
        let worst = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f32>();
        Ok(worst(&a.video, &b.video)?.max(worst(&a.audio, &b.audio)?))
    }

    #[test]
    fn a_perfect_network_gives_the_clean_latents() -> Result<()> {
        let shape = LatentShape {
            video: [2, 2, 2, 3],
            audio: [4, 2, 2],
        };
        // Variables, as the weights are while a network trains.
        let clean = noise(&shape, &[1], &Device::Cpu)?.map(|x| Ok(Var::from_tensor(x)?.into_inner()))?;
        let start = noise(&shape, &[2], &Device::Cpu)?;
        let empty = Tensor::zeros((1, 1, 4), DType::F32, &Device::Cpu)?;
        let text = TextCondition {
            states: empty.clone(),
            mask: empty.narrow(2, 0, 1)?.squeeze(2)?,
        };
        let prompts = Prompts {
            negative: text.clone(),
            text,
            audio_negative: None,
        };
        let off = Guidance {
            video: 1.0,
            audio: 1.0,
        };
        for (objective, steps) in [(Objective::Flow, 20), (Objective::Ddpm, 40)] {
            let oracle = Oracle {
                clean: clean.clone(),
                objective,
            };
            let sampler = Sampler {
                objective,
                steps,
                shift: 1.5,
            };
            let mut seen = 0;
            let result = sample(&sampler, &oracle, &start, &prompts, off, &mut |step| {
                seen = step.done;
                true
            })?;
            let result = result.ok_or_else(|| candle_core::Error::msg("cancelled"))?;
            assert_eq!(seen, steps);
            assert!(!result.video.track_op(), "the graph of all steps was kept");
            assert!(
                far(&result, &clean)? < 1e-5,
                "{objective:?}: {}",
                far(&result, &clean)?
            );
        }
        Ok(())
    }

    #[test]
    fn cancelling_ends_the_loop() -> Result<()> {
        let shape = LatentShape {
            video: [1, 1, 1, 1],
            audio: [1, 1, 1],
        };
        let clean = noise(&shape, &[1], &Device::Cpu)?;
        let oracle = Oracle {
            clean: clean.clone(),
            objective: Objective::Flow,
        };
        let sampler = Sampler {
            objective: Objective::Flow,
            steps: 10,
            shift: 1.0,
        };
        let one = Tensor::ones((1, 1, 1), DType::F32, &Device::Cpu)?;
        let text = TextCondition {
            states: one.clone(),
            mask: one.squeeze(2)?,
        };
        let guidance = Guidance {
            video: 3.0,
            audio: 2.0,
        };
        let prompts = Prompts {
            negative: text.clone(),
            audio_negative: Some(text.clone()),
            text,
        };
        let result = sample(&sampler, &oracle, &clean, &prompts, guidance, &mut |step| {
            step.done < 3
        })?;
        assert!(result.is_none());
        Ok(())
    }
}

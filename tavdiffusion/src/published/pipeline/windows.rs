//! Long clips out of windows that overlap: all are denoised at each step, and what they predict where they overlap is averaged.

use candle_core::{Result, Tensor, bail};

/// A stretch of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// What is denoised at a time: frames of the clip and steps of the sound at the same moments, or one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) video: Option<Span>,
    pub(super) audio: Option<Span>,
}

/// Spans of length `window` that cover `length` places and share at least `overlap`; the last one ends at the end.
pub(super) fn cover(length: usize, window: usize, overlap: usize) -> Vec<Span> {
    if length <= window {
        return vec![Span {
            start: 0,
            len: length,
        }];
    }
    let last = length - window;
    let step = window.saturating_sub(overlap).max(1);
    let mut starts: Vec<usize> = (0..last).step_by(step).collect();
    starts.push(last);
    starts
        .into_iter()
        .map(|start| Span { start, len: window })
        .collect()
}

/// The spans of an axis of `length` places at the moments of `spans`, which are of one of `of` places; all are of one length.
pub(super) fn alongside(spans: &[Span], of: usize, length: usize) -> Vec<Span> {
    let scaled = |places: usize| (places as f64 * length as f64 / of as f64).ceil() as usize;
    spans
        .iter()
        .map(|span| {
            let len = scaled(span.len).clamp(1, length);
            // The first place that is heard when the span begins.
            let start = (span.start as f64 * length as f64 / of as f64).floor() as usize;
            Span {
                start: start.min(length - len),
                len,
            }
        })
        .collect()
}

/// Averages what windows predict.
pub(super) struct Blend {
    axis: usize,
    length: usize,
    /// Places over which a window fades in and out; none where all of it counts the same.
    fade: usize,
    sum: Option<Tensor>,
    weights: Vec<f32>,
}

impl Blend {
    /// Of windows along `axis`, which has `length` places.
    pub(super) fn new(axis: usize, length: usize, fade: usize) -> Self {
        Self {
            axis,
            length,
            fade,
            sum: None,
            weights: vec![0.0; length],
        }
    }

    /// Takes what one window predicts.
    pub(super) fn add(&mut self, part: &Tensor, span: Span) -> Result<()> {
        if span.len == self.length {
            // The only one.
            self.sum = Some(part.clone());
            self.weights.fill(1.0);
            return Ok(());
        }
        let weight = |i: usize| (i + 1).min(span.len - i).min(self.fade + 1) as f32;
        let own: Vec<f32> = (0..span.len).map(weight).collect();
        for (sum, own) in self.weights[span.start..].iter_mut().zip(&own) {
            *sum += own;
        }
        let mut shape = vec![1; part.rank()];
        shape[self.axis] = span.len;
        let own = Tensor::from_vec(own, shape, part.device())?;
        let after = self.length - span.start - span.len;
        let part = part
            .broadcast_mul(&own)?
            .pad_with_zeros(self.axis, span.start, after)?;
        self.sum = Some(match &self.sum {
            None => part,
            Some(sum) => (sum + part)?,
        });
        Ok(())
    }

    /// The average, where there was a window.
    pub(super) fn finish(self) -> Result<Option<Tensor>> {
        let Some(sum) = self.sum else { return Ok(None) };
        if self.weights.contains(&0.0) {
            bail!("windows: they leave out some of {} places", self.length);
        }
        if self.weights.iter().all(|&weight| weight == 1.0) {
            return Ok(Some(sum));
        }
        let mut shape = vec![1; sum.rank()];
        shape[self.axis] = self.length;
        let weights = Tensor::from_vec(self.weights, shape, sum.device())?;
        sum.broadcast_div(&weights).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn windows_cover_both_axes() {
        for (length, window, overlap, of) in [
            (24, 24, 8, 160),
            (25, 24, 8, 160),
            (100, 24, 8, 643),
            (50, 7, 3, 40),
            (9, 4, 3, 9),
        ] {
            let spans = cover(length, window, overlap);
            let last = spans[spans.len() - 1];
            assert_eq!((spans[0].start, last.start + last.len), (0, length));
            for pair in spans.windows(2) {
                assert!(
                    pair[1].start > pair[0].start && pair[1].start + overlap <= pair[0].start + pair[0].len
                );
            }
            let heard = alongside(&spans, length, of);
            let mut covered = vec![false; of];
            for span in &heard {
                assert_eq!(span.len, heard[0].len);
                covered[span.start..span.start + span.len].fill(true);
            }
            assert!(covered.iter().all(|&c| c), "{length} {window} {overlap} {of}");
        }
        // The published sizes.
        assert_eq!(
            alongside(&cover(20, 24, 8), 20, 128),
            [Span { start: 0, len: 128 }]
        );
    }

    #[test]
    fn windows_are_averaged() -> Result<()> {
        let blend = |fade: usize| -> Result<Vec<f32>> {
            let mut blend = Blend::new(1, 6, fade);
            for (start, value) in [(0, 1f32), (2, 4.0)] {
                blend.add(
                    &Tensor::full(value, (1, 4), &Device::Cpu)?,
                    Span { start, len: 4 },
                )?;
            }
            let Some(found) = blend.finish()? else {
                bail!("none")
            };
            found.squeeze(0)?.to_vec1()
        };
        assert_eq!(blend(0)?, [1.0, 1.0, 2.5, 2.5, 4.0, 4.0]);
        // Fading over two places: weights 1 2 2 1 of both.
        assert_eq!(blend(2)?, [1.0, 1.0, 2.0, 3.0, 4.0, 4.0]);
        let mut hole = Blend::new(0, 5, 0);
        hole.add(
            &Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu)?,
            Span { start: 0, len: 2 },
        )?;
        assert!(hole.finish().is_err());
        assert!(Blend::new(0, 5, 0).finish()?.is_none());
        Ok(())
    }
}

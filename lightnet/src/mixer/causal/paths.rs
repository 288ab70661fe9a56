//! Several ways through the same tokens: a causal mixer sees both sides of a sequence, or the rows and columns of a picture, by going
//! through them more than once with the same maps and gates (arXiv 2404.07904, the image models and Long Range Arena).
//!
//! The recurrence runs once a way; what it gives is put back into the order of the tokens and summed, before the norm of the output.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use fulgur_kernels::order::Order;

/// Ways whose results are summed; or none, where every token meets all others.
#[derive(Clone, Debug)]
pub struct Paths {
    ways: Vec<Way>,
    borders: Option<Arc<[usize]>>,
    whole: bool,
}

/// One way: the order of the tokens, and the number of equal parts that each sequence is cut into.
#[derive(Clone, Debug)]
pub struct Way {
    order: Option<Order>,
    parts: usize,
}

impl Way {
    /// Through all tokens of a sequence, from the first to the last, or in another order.
    pub fn through(order: Option<Order>) -> Self {
        Self { order, parts: 1 }
    }

    /// Through `parts` equal parts of a sequence, each by itself.
    #[must_use]
    pub fn in_parts(self, parts: usize) -> Self {
        Self { parts, ..self }
    }

    /// `[B, N, ..]` in the order of the way, `[B parts, N / parts, ..]`.
    fn enter(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.order {
            Some(order) => order.apply(x)?,
            None => x.clone(),
        };
        if self.parts == 1 {
            return Ok(x);
        }
        let mut shape = x.dims().to_vec();
        if !shape[1].is_multiple_of(self.parts) {
            bail!("{} tokens do not make {} equal parts", shape[1], self.parts);
        }
        shape[0] *= self.parts;
        shape[1] /= self.parts;
        x.reshape(shape)
    }

    /// The tokens `[B, N, ..]` again.
    fn leave(&self, y: &Tensor) -> Result<Tensor> {
        let mut shape = y.dims().to_vec();
        shape[0] /= self.parts;
        shape[1] *= self.parts;
        let y = y.reshape(shape)?;
        match &self.order {
            Some(order) => order.undo(&y),
            None => Ok(y),
        }
    }
}

impl Paths {
    /// The sum over `ways` through tokens `[B, N]`, or, between `borders` in a batch of one, through packed sequences, whose orders
    /// have to keep each within its borders.
    pub fn along(ways: Vec<Way>, borders: Option<Arc<[usize]>>) -> Self {
        Self {
            ways,
            borders,
            whole: false,
        }
    }

    /// Every token meets all others of its sequence: for softmax attention.
    pub fn whole(borders: Option<Arc<[usize]>>) -> Self {
        Self {
            ways: Vec::new(),
            borders,
            whole: true,
        }
    }

    /// Whether every token meets all others.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// The borders of packed sequences.
    pub(super) fn borders(&self) -> Option<&[usize]> {
        self.borders.as_deref()
    }

    /// The sum of what `mix` makes of `tensors` `[B, N, ..]` on each way, given the borders of packed sequences.
    pub(super) fn sum(
        &self,
        tensors: &[&Tensor],
        mix: impl Fn(&[Tensor], Option<&[usize]>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for way in &self.ways {
            let entering: Vec<Tensor> = tensors.iter().map(|x| way.enter(x)).collect::<Result<_>>()?;
            let y = way.leave(&mix(&entering, self.borders())?)?;
            sum = Some(match sum {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        match sum {
            Some(sum) => Ok(sum),
            None => bail!("only softmax attention and LightNet see all tokens at once, this mixer scans"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use fulgur_kernels::decay::LogDecay;
    use fulgur_kernels::philox::Philox;

    use super::super::Memory;
    use super::super::memory::decayed;
    use super::*;

    const ROWS: usize = 3;
    const COLUMNS: usize = 4;
    const KEYS: usize = 2;

    fn random(shape: &[usize], name: &str) -> Result<Tensor> {
        let values = Philox::named(1, name).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F64)
    }

    /// What a scan of the tokens `way`, one after the other, gives at each of them: literally, for one head with values of width 1.
    fn scan(way: &[usize], [q, k, v, log]: [&[f64]; 4], o: &mut [f64]) {
        let mut state = [0.0; KEYS];
        for &token in way {
            for (channel, state) in state.iter_mut().enumerate() {
                let at = token * KEYS + channel;
                *state = log[at].exp() * *state + k[at] * v[token];
                o[token] += q[at] * *state;
            }
        }
    }

    /// Scans of rows and columns in both directions beside loops over rows and columns.
    #[test]
    fn scans_of_a_picture_are_loops_over_its_rows_and_columns() -> Result<()> {
        let tokens = ROWS * COLUMNS;
        let wide = [1, tokens, 1, KEYS];
        let (q, k) = (random(&wide, "q")?, random(&wide, "k")?);
        let v = random(&[1, tokens, 1, 1], "v")?;
        let log = random(&wide, "log")?.abs()?.neg()?;
        let reversed: Vec<u32> = (0..tokens as u32).rev().collect();
        let mut columns: Vec<u32> = (0..COLUMNS)
            .flat_map(|column| (0..ROWS).map(move |row| (row * COLUMNS + column) as u32))
            .collect();
        let order = |there: &[u32]| Order::new(there, tokens, &Device::Cpu).map(Some);
        let down = order(&columns)?;
        columns.reverse();
        let ways = vec![
            Way::through(None).in_parts(ROWS),
            Way::through(order(&reversed)?).in_parts(ROWS),
            Way::through(down).in_parts(COLUMNS),
            Way::through(order(&columns)?).in_parts(COLUMNS),
        ];
        let mut memory = Memory::along(Arc::new(Paths::along(ways, None)));
        let o = decayed(&q, &k, &v, LogDecay::Channel(&log), Some(&mut memory))?;
        let list = |x: &Tensor| x.flatten_all()?.to_vec1::<f64>();
        let [q, k, v, log] = [list(&q)?, list(&k)?, list(&v)?, list(&log)?];
        let operands = [&q[..], &k, &v, &log];
        let mut expected = vec![0.0; tokens];
        let mut both = |mut way: Vec<usize>| {
            scan(&way, operands, &mut expected);
            way.reverse();
            scan(&way, operands, &mut expected);
        };
        for row in 0..ROWS {
            both((0..COLUMNS).map(|column| row * COLUMNS + column).collect());
        }
        for column in 0..COLUMNS {
            both((0..ROWS).map(|row| row * COLUMNS + column).collect());
        }
        for (found, expected) in list(&o)?.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
        }
        Ok(())
    }

    #[test]
    fn parts_have_to_be_equal() -> Result<()> {
        let x = random(&[1, 7, 1, 1], "x")?;
        let way = Way::through(None).in_parts(2);
        let line = way.enter(&x).unwrap_err().to_string();
        assert!(line.contains("7 tokens do not make 2 equal parts"), "{line}");
        Ok(())
    }
}

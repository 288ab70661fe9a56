//! Tokens in another order: the reversed sequence of a scan that comes back, the columns of a picture that lies in rows.
//!
//! ```text
//! y_j = x_there[j]          dx_i = dy_back[i]
//! ```
//!
//! Every token has one place, so the gradient is a look-up too: nothing is added up, and bits are the same each time.

use candle_core::{Device, Result, Tensor};

use crate::autograd::{Gradient, Value, attach1};
use crate::error::OpError;
use crate::tape::{Needs, Set};

const OP: &str = "order";

/// An order of N tokens in M places; places beyond the N of the tokens are padding.
#[derive(Clone, Debug)]
pub struct Order {
    /// `[M]`, the token at each place.
    there: Tensor,
    /// `[N]`, the place of each token.
    back: Tensor,
    /// `[M]` in f32, 1 where a token is and 0 at padding; none without padding.
    real: Option<Tensor>,
}

impl Order {
    /// Puts token `there[j]` at place j; each of `tokens` tokens has to be somewhere. Places that name a token again are padding:
    /// they show its values and give no gradient.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use fulgur_kernels::order::Order;
    /// let x = Tensor::new(&[[[1f32], [2.0], [3.0]]], &Device::Cpu)?;
    /// let reversed = Order::new(&[2, 1, 0], 3, &Device::Cpu)?.apply(&x)?;
    /// assert_eq!(reversed.flatten_all()?.to_vec1::<f32>()?, [3.0, 2.0, 1.0]);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// A token is beyond `tokens` or has no place, or the device is out of memory.
    pub fn new(there: &[u32], tokens: usize, device: &Device) -> Result<Self> {
        let mut back = vec![u32::MAX; tokens];
        let mut real = vec![0f32; there.len()];
        for (place, &token) in there.iter().enumerate() {
            match back.get_mut(token as usize) {
                Some(at) if *at == u32::MAX => {
                    *at = place as u32;
                    real[place] = 1.0;
                }
                Some(_) => {}
                None => {
                    let expected = format!("less than {tokens}");
                    return Err(OpError::value(OP, "token", token, expected).into());
                }
            }
        }
        if let Some(token) = back.iter().position(|&place| place == u32::MAX) {
            return Err(OpError::value(OP, "token", token, "a place for each").into());
        }
        let padded = there.len() > tokens;
        Ok(Self {
            there: Tensor::new(there, device)?,
            back: Tensor::new(back, device)?,
            real: padded.then(|| Tensor::new(real, device)).transpose()?,
        })
    }

    /// The places `[B, M, ..]` of the tokens `x` `[B, N, ..]`. Differentiable.
    ///
    /// # Errors
    /// Another number of tokens, or another device.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.check("x", x, &self.back)?;
        let gradient = Moved {
            from: self.back.clone(),
            real: None,
        };
        moved(x, &self.there, gradient)
    }

    /// The tokens `[B, N, ..]` at the places `y` `[B, M, ..]`. Differentiable.
    ///
    /// # Errors
    /// Another number of places, or another device.
    pub fn undo(&self, y: &Tensor) -> Result<Tensor> {
        self.check("y", y, &self.there)?;
        let gradient = Moved {
            from: self.there.clone(),
            real: self.real.clone(),
        };
        moved(y, &self.back, gradient)
    }

    /// `[M]` in f32, 1 where a token is and 0 at padding; none without padding.
    pub fn real(&self) -> Option<&Tensor> {
        self.real.as_ref()
    }

    fn check(&self, field: &'static str, x: &Tensor, ids: &Tensor) -> Result<()> {
        let count = ids.elem_count();
        if x.rank() < 2 || x.dims()[1] != count {
            return Err(OpError::shape(OP, field, x, format!("[B, {count}, ..]")).into());
        }
        Ok(())
    }
}

fn moved(x: &Tensor, from: &Tensor, gradient: Moved) -> Result<Tensor> {
    let x = x.contiguous()?;
    let value = x.detach().index_select(from, 1)?;
    attach1(Value::Tensor(value), &x, gradient)
}

/// The adjoint of a move: the move back.
struct Moved {
    from: Tensor,
    /// Places whose adjoint counts; all where absent.
    real: Option<Tensor>,
}

impl Gradient<1> for Moved {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn holds(&self) -> Vec<Tensor> {
        let real = self.real.iter().cloned();
        std::iter::once(self.from.clone()).chain(real).collect()
    }

    fn backward(&self, _: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let mut back = grad.detach().contiguous()?.index_select(&self.from, 1)?;
        if let Some(real) = &self.real {
            let mut shape = vec![1; back.rank()];
            shape[1] = real.elem_count();
            let real = real.reshape(shape)?.to_dtype(back.dtype())?;
            back = back.broadcast_mul(&real)?;
        }
        Ok([Some(back)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;
    use candle_core::{DType, Var};

    fn random(shape: &[usize], name: &str) -> Result<Tensor> {
        let values = Philox::named(1, name).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F64)
    }

    /// Adjoints beside those of a product with the matrix that has a one where a place shows a token.
    #[test]
    fn moves_are_products_with_a_matrix_of_places() -> Result<()> {
        for there in [&[3u32, 0, 2, 1][..], &[1, 0, 3, 2, 2, 2, 0]] {
            let (tokens, places) = (4, there.len());
            let order = Order::new(there, tokens, &Device::Cpu)?;
            let mut seen = Vec::new();
            let mut shown = vec![0f64; places * tokens];
            let mut first = vec![0f64; places * tokens];
            for (place, &token) in there.iter().enumerate() {
                shown[place * tokens + token as usize] = 1.0;
                if !seen.contains(&token) {
                    seen.push(token);
                    first[place * tokens + token as usize] = 1.0;
                }
            }
            let matrix = |values| Tensor::from_vec(values, (places, tokens), &Device::Cpu);
            let (shown, first) = (matrix(shown)?, matrix(first)?);
            let x = Var::from_tensor(&random(&[2, tokens, 3], "x")?)?;
            let (y, weight) = (order.apply(&x)?, random(&[2, places, 3], "weight")?);
            let far = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
            assert_eq!(far(&y, &shown.broadcast_matmul(&x)?)?, 0.0);
            let grads = (&y * &weight)?.sum_all()?.backward()?;
            let dx = grads.get(&x).expect("a gradient");
            assert_eq!(far(dx, &first.t()?.broadcast_matmul(&weight)?)?, 0.0);

            let y = Var::from_tensor(&weight)?;
            let (z, weight) = (order.undo(&y)?, random(&[2, tokens, 3], "other")?);
            assert_eq!(far(&z, &first.t()?.broadcast_matmul(&y)?)?, 0.0);
            let grads = (&z * &weight)?.sum_all()?.backward()?;
            let dy = grads.get(&y).expect("a gradient");
            assert_eq!(far(dy, &first.broadcast_matmul(&weight)?)?, 0.0);
            assert_eq!(order.real().is_some(), places > tokens);
        }
        Ok(())
    }

    #[test]
    fn what_is_no_order_is_refused() -> Result<()> {
        let line = |there: &[u32], tokens| {
            let result = Order::new(there, tokens, &Device::Cpu);
            result.map(drop).unwrap_err().to_string()
        };
        assert!(line(&[0, 4], 2).contains("token is 4, expected less than 2"));
        assert!(line(&[0, 2], 3).contains("token is 1, expected a place for each"));
        let order = Order::new(&[1, 0], 2, &Device::Cpu)?;
        let error = order.apply(&random(&[2, 3, 1], "x")?).unwrap_err().to_string();
        assert!(error.contains("[B, 2, ..]"), "{error}");
        Ok(())
    }
}

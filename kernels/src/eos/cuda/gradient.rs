//! The reverse sweep, and what is summed after it.

use super::lanes::{Adjoint, Buffers};
use super::{EOS, NAME, Operands, Scan, ScanArg, dense, start, suffix};
use crate::autograd::GradientOfMany;
use crate::cuda_module::{flat, launch};
use crate::decay::Passed;
use crate::decay::cuda::sweep::Made;
use crate::eos::Dims;
use crate::exchange::Direction;
use candle_core::{DType, Result, Tensor, bail};

/// Backward of the output, and of the final memory behind it.
pub(super) struct ScanGradient {
    pub(super) scan: Scan,
    pub(super) entering: Option<Tensor>,
    /// Memories at borders, where they were kept.
    pub(super) borders: Option<Tensor>,
    pub(super) d_state: Passed,
}

impl ScanGradient {
    /// The memories at borders, made again where they were not kept.
    fn borders(&self, operands: &Operands) -> Result<Tensor> {
        if let Some(borders) = &self.borders {
            return Ok(borders.clone());
        }
        let borders = self.scan.borders()?;
        let argument = self
            .scan
            .forward_argument(operands, self.entering.as_ref(), Some(&borders))?;
        self.scan.launch("forward", Buffers::Forward, argument)?;
        Ok(borders.tensor())
    }

    /// What is summed inside of the sweep for the adjoint of such gates.
    fn adjoint(&self, gates: &Tensor) -> Adjoint {
        let Dims { n, k, d, .. } = self.scan.dims;
        let alike = |axis: usize, whole: usize| gates.dims()[axis] != whole;
        if !gates.track_op() {
            Adjoint::Unwanted
        } else if alike(1, n) {
            Adjoint::Tokens
        } else if alike(4, d) {
            Adjoint::Columns
        } else if alike(3, k) {
            Adjoint::Rows
        } else {
            Adjoint::Elements
        }
    }

    /// Room for that adjoint.
    fn gate_room(&self, adjoint: Adjoint, gates: &Tensor) -> Result<Option<Made>> {
        let Dims { b, n, h, k, d } = self.scan.dims;
        let whole = gates.dims() == [b, n, h, k, d];
        let dtype = if whole { gates.dtype() } else { DType::F32 };
        let shape = match adjoint {
            Adjoint::Unwanted => return Ok(None),
            Adjoint::Elements => vec![b, n, h, k, d],
            Adjoint::Columns => vec![self.scan.tiles(), b, n, h, k],
            Adjoint::Rows => vec![b, n, h, 1, d],
            Adjoint::Tokens => vec![b, self.scan.cut.segments() / b, h, k, d],
        };
        Made::new(&self.scan.device, dtype, shape.into()).map(Some)
    }

    /// Sums what the sweep left over the axes along which gates are alike.
    fn gate_adjoint(&self, made: Tensor, adjoint: Adjoint, gates: &Tensor) -> Result<Tensor> {
        let mut found = made;
        if adjoint == Adjoint::Columns {
            found = self.sum(&found, 0, DType::F32)?.squeeze(0)?.unsqueeze(4)?;
        }
        for (axis, &wanted) in gates.dims().iter().enumerate() {
            if found.dims()[axis] != wanted {
                found = self.sum(&found, axis, DType::F32)?;
            }
        }
        found.to_dtype(gates.dtype())
    }

    /// The sum of contiguous f32 over an axis, which becomes 1, in a fixed order.
    fn sum(&self, x: &Tensor, axis: usize, dtype: DType) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let count = std::mem::replace(&mut shape[axis], 1);
        if count == 1 {
            return x.to_dtype(dtype);
        }
        let (outer, inner): (usize, usize) = (shape[..axis].iter().product(), shape[axis..].iter().product());
        let sums = Made::new(&self.scan.device, dtype, shape.into())?;
        let name = format!("eos_sum_{}", suffix(dtype));
        launch!(&self.scan.device, EOS, name, flat(outer * inner);
            start(Some(x))?, sums.start()?, outer as i64, count as i64, inner as i64);
        Ok(sums.tensor())
    }
}

impl GradientOfMany for ScanGradient {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let d_state = match self.d_state.lock() {
            Ok(mut d_state) => d_state.take(),
            Err(_) => bail!("{NAME}: the adjoint of the memory was lost in a panic"),
        };
        let d_state = d_state.map(|d_state| d_state.contiguous()).transpose()?;
        let scan = &self.scan;
        let Dims { b, n, h, k, d } = scan.dims;
        let operands = Operands::new(args)?;
        let d_output = dense(grad)?;
        let borders = self.borders(&operands)?;
        let Operands {
            expand,
            input,
            shrink,
            ..
        } = &operands;
        let (arriving, d_initial) = if scan.whole() {
            (d_state, None)
        } else {
            let rows = [shrink, &d_output];
            let (arriving, first) = scan.join(rows, &operands, d_state.as_ref(), Direction::Backward)?;
            (Some(arriving), Some(first))
        };
        let made = |dtype, shape: Vec<usize>| Made::new(&scan.device, dtype, shape.into());
        let d_input = made(scan.dtype, vec![b, n, h, d])?;
        let d_expand = made(DType::F32, vec![scan.tiles(), b, n, h, k])?;
        let d_shrink = made(DType::F32, vec![scan.tiles(), b, n, h, k])?;
        let adjoint = self.adjoint(&args[3]);
        let d_log = self.gate_room(adjoint, &args[3])?;
        let rows = [Some(expand), Some(input), Some(shrink), Some(&d_output)];
        let mut argument = ScanArg {
            enter: start(arriving.as_ref())?,
            borders: start(Some(&borders))?,
            d_input: d_input.start()?,
            d_expand: d_expand.start()?,
            d_shrink: d_shrink.start()?,
            d_log: d_log.as_ref().map_or(Ok(0), Made::start)?,
            adjoint: adjoint as i32,
            d_log_half: i32::from(args[3].dtype() == DType::BF16 && args[3].dims() == [b, n, h, k, d]),
            ..scan.argument(rows, &operands)?
        };
        let d_initial = match d_initial {
            Some(d_initial) => d_initial,
            None => {
                let d_initial = scan.memories(scan.cut.sequences())?;
                argument.leave = d_initial.start()?;
                d_initial
            }
        };
        scan.launch("backward", Buffers::Backward(adjoint), argument)?;
        let tiles = |sums: Made| self.sum(&sums.tensor(), 0, scan.dtype)?.squeeze(0);
        let mut all = vec![
            Some(tiles(d_expand)?),
            Some(d_input.tensor()),
            Some(tiles(d_shrink)?),
            d_log
                .map(|d_log| self.gate_adjoint(d_log.tensor(), adjoint, &args[3]))
                .transpose()?,
        ];
        if args.len() > all.len() {
            all.push(Some(d_initial.tensor()));
        }
        for (adjoint, arg) in all.iter_mut().zip(args) {
            if !arg.track_op() {
                *adjoint = None;
            }
        }
        Ok(all)
    }
}

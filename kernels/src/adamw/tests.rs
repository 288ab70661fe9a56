use super::*;
use crate::testing::{normal, relative_rms, values};
use candle_core::{Device, Var};

fn f32_normal(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

/// AdamW in f64: parameter after each gradient.
fn reference(adamw: &AdamW, parameter: &[f64], gradients: &[Vec<f64>]) -> Vec<f64> {
    let (mut p, mut m, mut v) = (
        parameter.to_vec(),
        vec![0.0; parameter.len()],
        vec![0.0; parameter.len()],
    );
    for (t, gradient) in gradients.iter().enumerate() {
        let t = t as i32 + 1;
        for i in 0..p.len() {
            m[i] = adamw.beta1 * m[i] + (1.0 - adamw.beta1) * gradient[i];
            v[i] = adamw.beta2 * v[i] + (1.0 - adamw.beta2) * gradient[i] * gradient[i];
            let mean = m[i] / (1.0 - adamw.beta1.powi(t));
            let spread = (v[i] / (1.0 - adamw.beta2.powi(t))).sqrt() + adamw.eps;
            p[i] -= adamw.lr * (adamw.weight_decay * p[i] + mean / spread);
        }
    }
    p
}

#[test]
fn several_steps_agree_with_reference() -> Result<()> {
    let adamw = AdamW {
        lr: 0.02,
        beta1: 0.9,
        beta2: 0.98,
        eps: 1e-6,
        weight_decay: 0.1,
    };
    for shape in [&[1][..], &[7, 9], &[30_001]] {
        let start = f32_normal(1, shape);
        for device_scale in [false, true] {
            let parameter = Var::from_tensor(&start)?;
            let moments = zero_moments(&parameter)?;
            let factor = Tensor::new(&[0.25f32], &Device::Cpu)?;
            let mut scaled = vec![];
            for step in 1..=6 {
                let gradient = f32_normal(10 + step, shape);
                scaled.push(values(&gradient).iter().map(|g| 0.25 * g).collect());
                let scale = match device_scale {
                    true => GradientScale::Device(&factor),
                    false => GradientScale::Host(0.25),
                };
                adamw.step(&parameter, &moments, &gradient, step, scale)?;
            }
            let wanted = reference(&adamw, &values(&start), &scaled);
            let error = relative_rms(&values(&parameter), &wanted);
            assert!(error < 1e-6, "{shape:?} {device_scale}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn saved_moments_continue_bit_for_bit() -> Result<()> {
    let run = |parameter: &Var, moments: &Tensor, steps: std::ops::Range<u64>| -> Result<()> {
        for step in steps {
            let gradient = f32_normal(step, &[100]);
            AdamW::default().step(parameter, moments, &gradient, step, GradientScale::Host(1.0))?;
        }
        Ok(())
    };
    let whole = Var::from_tensor(&f32_normal(1, &[100]))?;
    let whole_moments = zero_moments(&whole)?;
    run(&whole, &whole_moments, 1..7)?;
    let part = Var::from_tensor(&f32_normal(1, &[100]))?;
    let moments = zero_moments(&part)?;
    run(&part, &moments, 1..4)?;
    let (part, moments) = (Var::from_tensor(&part.copy()?)?, moments.copy()?);
    run(&part, &moments, 4..7)?;
    assert_eq!(values(&part), values(&whole));
    assert_eq!(values(&moments), values(&whole_moments));
    Ok(())
}

#[test]
fn norm_and_clipping() -> Result<()> {
    let tensors = [
        f32_normal(1, &[3]),
        f32_normal(2, &[300, 301]),
        f32_normal(3, &[8, 9]).t()?,
    ];
    let borrowed: Vec<&Tensor> = tensors.iter().collect();
    let wanted: f64 = tensors.iter().flat_map(values).map(|x| x * x).sum();
    let mut bits = vec![];
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let sum = pool.install(|| squared_norm(&borrowed))?;
        assert!((values(&sum)[0] / wanted - 1.0).abs() < 1e-7);
        bits.push(values(&sum));
        let clipped = values(&clip_scale(&sum, 2.0)?)[0];
        assert!((clipped * wanted.sqrt() - 2.0).abs() < 1e-5);
        assert_eq!(values(&clip_scale(&sum, 1e6)?), [1.0]);
    }
    assert_eq!(bits[0], bits[1]);
    assert_eq!(
        values(&clip_scale(&Tensor::zeros(1, DType::F32, &Device::Cpu)?, 1.0)?),
        [1.0]
    );
    Ok(())
}

#[test]
fn refuses_what_does_not_fit_and_changes_nothing() -> Result<()> {
    let parameter = Var::from_tensor(&f32_normal(1, &[2, 3]))?;
    let (moments, before) = (zero_moments(&parameter)?, values(&parameter));
    let message = |moments: &Tensor, gradient: &Tensor, step| {
        let adamw = AdamW::default();
        adamw
            .step(&parameter, moments, gradient, step, GradientScale::Host(1.0))
            .unwrap_err()
            .to_string()
    };
    let gradient = f32_normal(2, &[2, 3]);
    assert_eq!(
        message(&moments, &f32_normal(2, &[3, 2]), 1),
        "adamw: gradient has shape [3, 2], expected [2, 3] like parameter"
    );
    assert_eq!(
        message(&gradient, &gradient, 1),
        "adamw: moments has shape [2, 3], expected 2 x [2, 3]"
    );
    assert_eq!(
        message(&moments, &gradient, 0),
        "adamw: step is 0, expected at least 1"
    );
    assert_eq!(
        message(&moments, &normal(2, &[2, 3]), 1),
        "adamw: gradient is F64 on the CPU, supported: f32, bf16"
    );
    assert_eq!(values(&parameter), before);
    Ok(())
}

/// Parameters of several shapes, with gradients and moments of every type.
struct Model {
    parameters: Vec<Var>,
    moments: Vec<Tensor>,
    copies: Vec<Tensor>,
    gradients: DType,
}

impl Model {
    const SHAPES: [&[usize]; 4] = [&[1], &[7, 9], &[30_001], &[64, 33]];

    fn new(moments: DType, gradients: DType) -> Result<Self> {
        let (mut parameters, mut all_moments, mut copies) = (vec![], vec![], vec![]);
        for (i, shape) in Self::SHAPES.into_iter().enumerate() {
            let parameter = Var::from_tensor(&f32_normal(i as u64, shape))?;
            all_moments.push(zero_moments_in(&parameter, moments)?);
            copies.push(Tensor::zeros(shape, DType::BF16, &Device::Cpu)?);
            parameters.push(parameter);
        }
        Ok(Self {
            parameters,
            moments: all_moments,
            copies,
            gradients,
        })
    }

    fn gradients(&self, step: u64) -> Result<Vec<Tensor>> {
        let draw = |i: usize| f32_normal(10 * step + i as u64, Self::SHAPES[i]).to_dtype(self.gradients);
        (0..Self::SHAPES.len()).map(draw).collect()
    }

    /// Copies of the parameters.
    fn averages(&self) -> Result<Vec<Tensor>> {
        self.parameters.iter().map(|var| var.copy()).collect()
    }

    fn slots<'a>(&'a self, gradients: &'a [Tensor]) -> Vec<Slot<'a>> {
        (0..gradients.len())
            .map(|i| Slot {
                parameter: &self.parameters[i],
                moments: &self.moments[i],
                gradient: &gradients[i],
                rounded: (i != 2).then_some(&self.copies[i]),
            })
            .collect()
    }

    fn state(&self) -> Vec<Vec<f64>> {
        let parameters = self.parameters.iter().map(|var| values(var));
        parameters
            .chain(self.moments.iter().chain(&self.copies).map(values))
            .collect()
    }
}

/// What [`AdamW::step_all`] does to an element, in f64 but for the rounding of moments.
fn literal(adamw: &AdamW, model: &Model, steps: u64, scale: f64) -> Result<Vec<Vec<f64>>> {
    let mut states = vec![];
    for i in 0..Model::SHAPES.len() {
        let dtype = model.moments[i].dtype();
        let round = |x: f64| match dtype {
            DType::BF16 => f64::from(half::bf16::from_f64(x).to_f32()),
            _ => x,
        };
        let mut p = values(&f32_normal(i as u64, Model::SHAPES[i]));
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        for step in 1..=steps {
            let gradient = values(&model.gradients(step)?[i]);
            for j in 0..p.len() {
                let g = scale * gradient[j];
                m[j] = round(adamw.beta1 * m[j] + (1.0 - adamw.beta1) * g);
                v[j] = round(adamw.beta2 * v[j] + (1.0 - adamw.beta2) * g * g);
                let mean = m[j] / (1.0 - adamw.beta1.powi(step as i32));
                let spread = (v[j] / (1.0 - adamw.beta2.powi(step as i32))).sqrt() + adamw.eps;
                p[j] -= adamw.lr * (adamw.weight_decay * p[j] + mean / spread);
            }
        }
        states.push(p);
    }
    Ok(states)
}

#[test]
fn groups_of_every_type_agree_with_the_formula() -> Result<()> {
    let adamw = AdamW {
        lr: 0.02,
        beta2: 0.95,
        weight_decay: 0.1,
        ..AdamW::default()
    };
    let types = [DType::F32, DType::BF16];
    for (moments, gradients) in types.into_iter().flat_map(|m| types.map(|g| (m, g))) {
        let model = Model::new(moments, gradients)?;
        for step in 1..=4 {
            let gradients = model.gradients(step)?;
            adamw.step_all(&model.slots(&gradients), step, GradientScale::Host(0.5))?;
        }
        // A moment that lies between two numbers of bf16 may go to the other one in f64.
        let tolerance = if moments == DType::BF16 { 2e-4 } else { 1e-6 };
        for (i, wanted) in literal(&adamw, &model, 4, 0.5)?.iter().enumerate() {
            let error = relative_rms(&values(&model.parameters[i]), wanted);
            assert!(error < tolerance, "{moments:?} {gradients:?} {i}: {error:e}");
            let copy = match i {
                2 => model.parameters[i].zeros_like()?.to_dtype(DType::BF16)?,
                _ => model.parameters[i].to_dtype(DType::BF16)?,
            };
            assert_eq!(values(&model.copies[i]), values(&copy));
        }
    }
    Ok(())
}

#[test]
fn groups_have_the_bits_of_single_steps_on_any_number_of_threads() -> Result<()> {
    let single = Model::new(DType::F32, DType::F32)?;
    for step in 1..=3 {
        for (i, gradient) in single.gradients(step)?.iter().enumerate() {
            let (parameter, moments) = (&single.parameters[i], &single.moments[i]);
            AdamW::default().step(parameter, moments, gradient, step, GradientScale::Host(0.3))?;
        }
    }
    let factor = Tensor::new(&[0.3f32], &Device::Cpu)?;
    for threads in [1, 3] {
        let group = Model::new(DType::F32, DType::F32)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        for step in 1..=3 {
            let gradients = group.gradients(step)?;
            let slots = group.slots(&gradients);
            pool.install(|| AdamW::default().step_all(&slots, step, GradientScale::Device(&factor)))?;
        }
        assert_eq!(group.state()[..8], single.state()[..8]);
    }
    Ok(())
}

#[test]
fn clipping_limits_the_norm_of_all_gradients() -> Result<()> {
    let device = &Device::Cpu;
    for dtype in [DType::F32, DType::BF16] {
        let gradients = Model::new(DType::F32, dtype)?.gradients(1)?;
        let borrowed: Vec<&Tensor> = gradients.iter().collect();
        let wanted = gradients
            .iter()
            .flat_map(values)
            .map(|x| x * x)
            .sum::<f64>()
            .sqrt();
        for (limit, scale) in [(Some(3.0), 3.0 / wanted), (Some(1e6), 1.0), (None, 1.0)] {
            let mut clipper = Clipper::new(limit, device)?;
            let clip = clipper.measure(&borrowed)?;
            assert!((values(clip.norm())[0] / wanted - 1.0).abs() < 1e-6);
            let GradientScale::Device(found) = clip.scale() else {
                panic!("the scale lies on the host");
            };
            assert!((values(found)[0] / scale - 1.0).abs() < 1e-6);
            if let Some(limit) = limit {
                assert_eq!(
                    values(found),
                    values(&clip_scale(&squared_norm(&borrowed)?, limit)?)
                );
            }
            assert_eq!((clipper.counts()?.made, clipper.counts()?.skipped), (1, 0));
        }
    }
    Ok(())
}

/// Gradients of a step, of which one element is `wrong`.
fn spoiled(model: &Model, step: u64, wrong: f32) -> Result<Vec<Tensor>> {
    let mut gradients = model.gradients(step)?;
    let mut values = gradients[1].flatten_all()?.to_vec1::<f32>()?;
    values[40] = wrong;
    gradients[1] = Tensor::from_vec(values, Model::SHAPES[1], &Device::Cpu)?;
    Ok(gradients)
}

#[test]
fn steps_without_a_finite_norm_are_skipped_and_counted() -> Result<()> {
    let model = Model::new(DType::BF16, DType::F32)?;
    let mut clipper = Clipper::new(Some(1.0), &Device::Cpu)?;
    let update = |clipper: &mut Clipper, gradients: &[Tensor]| -> Result<f64> {
        let clip = clipper.measure(&gradients.iter().collect::<Vec<_>>())?;
        AdamW::default().step_clipped(&model.slots(gradients), &clip)?;
        Ok(values(&clip.taken()?.to_dtype(DType::F64)?)[0])
    };
    assert_eq!(update(&mut clipper, &model.gradients(1)?)?, 1.0);
    let before = model.state();
    for (step, wrong) in [(2, f32::NAN), (3, f32::NEG_INFINITY), (4, 1e30)] {
        assert_eq!(update(&mut clipper, &spoiled(&model, step, wrong)?)?, 0.0);
        assert_eq!(model.state(), before, "{wrong}");
        let skipped = step as u32 - 1;
        let expected = Counts {
            made: 1,
            skipped,
            in_a_row: skipped,
            longest_row: skipped,
        };
        assert_eq!(clipper.counts()?, expected);
    }
    update(&mut clipper, &model.gradients(5)?)?;
    assert_ne!(model.state(), before);
    update(&mut clipper, &spoiled(&model, 6, f32::NAN)?)?;
    let expected = Counts {
        made: 2,
        skipped: 4,
        in_a_row: 1,
        longest_row: 3,
    };
    assert_eq!(clipper.counts()?, expected);
    Ok(())
}

/// Skipped steps leave no trace: the others have the bits of a run without them, also of one taken up from its counts.
#[test]
fn skipped_steps_have_no_number() -> Result<()> {
    let (plain, skipping) = (
        Model::new(DType::F32, DType::F32)?,
        Model::new(DType::F32, DType::F32)?,
    );
    let (plain_averages, skipping_averages) = (plain.averages()?, skipping.averages()?);
    let update = |model: &Model, averages: &[Tensor], clipper: &mut Clipper, gradients: &[Tensor]| {
        let clip = clipper.measure(&gradients.iter().collect::<Vec<_>>())?;
        AdamW::default().step_clipped(&model.slots(gradients), &clip)?;
        let pairs: Vec<_> = averages
            .iter()
            .zip(model.parameters.iter().map(Var::as_tensor))
            .collect();
        crate::average::follow(&pairs, 0.9, 10.0, &clip)
    };
    let mut counted = Clipper::new(Some(2.0), &Device::Cpu)?;
    let mut clipper = Clipper::new(Some(2.0), &Device::Cpu)?;
    for step in 1..=4 {
        let gradients = plain.gradients(step)?;
        update(&plain, &plain_averages, &mut counted, &gradients)?;
        update(
            &skipping,
            &skipping_averages,
            &mut clipper,
            &spoiled(&plain, step, f32::NAN)?,
        )?;
        update(&skipping, &skipping_averages, &mut clipper, &gradients)?;
        let counts = clipper.counts()?;
        clipper = Clipper::new(Some(2.0), &Device::Cpu)?;
        clipper.restore(counts)?;
    }
    assert_eq!(skipping.state(), plain.state());
    let bits = |averages: &[Tensor]| averages.iter().map(values).collect::<Vec<_>>();
    assert_eq!(bits(&skipping_averages), bits(&plain_averages));
    // The same as with numbers and shares from the host.
    let host = Model::new(DType::F32, DType::F32)?;
    let host_averages = host.averages()?;
    for step in 1..=4 {
        let gradients = host.gradients(step)?;
        let clip = Clipper::new(Some(2.0), &Device::Cpu)?.measure(&gradients.iter().collect::<Vec<_>>())?;
        AdamW::default().step_all(&host.slots(&gradients), step, clip.scale())?;
        let n = step as f64 - 1.0;
        for (average, var) in host_averages.iter().zip(&host.parameters) {
            crate::average::move_average(average, var, 1.0 - f64::min(0.9, (1.0 + n) / (10.0 + n)))?;
        }
    }
    assert_eq!(host.state(), plain.state());
    assert_eq!(bits(&host_averages), bits(&plain_averages));
    Ok(())
}

#[test]
fn refuses_groups_that_do_not_fit_and_changes_nothing() -> Result<()> {
    let model = Model::new(DType::F32, DType::F32)?;
    let (gradients, before) = (model.gradients(1)?, model.state());
    let (wide, turned) = (normal(1, &[64, 33]), f32_normal(1, &[33, 64]));
    let strided = Tensor::zeros((33, 64), DType::BF16, &Device::Cpu)?.t()?;
    let message = |last: Slot, scale: f64| {
        let mut slots = model.slots(&gradients);
        slots[3] = last;
        AdamW::default()
            .step_all(&slots, 1, GradientScale::Host(scale))
            .unwrap_err()
            .to_string()
    };
    let last = model.slots(&gradients)[3];
    let parameter = Slot {
        parameter: &wide,
        ..last
    };
    let gradient = Slot {
        gradient: &turned,
        ..last
    };
    let rounded = |tensor| Slot {
        rounded: Some(tensor),
        ..last
    };
    let wrong = [
        (last, f64::NAN, "scale is NaN, expected a finite number"),
        (parameter, 1.0, "parameter is F64 on the CPU, supported: f32"),
        (
            gradient,
            1.0,
            "gradient has shape [33, 64], expected [64, 33] like parameter",
        ),
        (
            rounded(&turned),
            1.0,
            "rounded is F32 on the CPU, supported: bf16",
        ),
        (rounded(&strided), 1.0, "rounded is strided, expected contiguous"),
    ];
    for (slot, scale, expected) in wrong {
        assert_eq!(message(slot, scale), format!("adamw: {expected}"));
    }
    assert_eq!(model.state(), before);
    assert_eq!(
        squared_norm(&[]).unwrap_err().to_string(),
        "squared_norm: number of tensors is 0, expected at least 1"
    );
    assert_eq!(
        Clipper::new(Some(0.0), &Device::Cpu).unwrap_err().to_string(),
        "clipper: max_norm is 0, expected a positive number"
    );
    Ok(())
}

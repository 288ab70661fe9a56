//! What a network takes and gives, by name, and the check of given tensors against it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use candle_core::{DType, Device, Tensor};
use serde::{Serialize, Serializer};

use super::NetworkError;

/// What the values of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Any numbers: f32, f16 or bf16.
    Numbers,
    /// Numbers from 0 to 1.
    Fractions,
    /// Whole numbers from 0 to below the given one.
    Ids(usize),
    /// Zeros and ones of any type.
    Mask,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Numbers => f.write_str("f32"),
            Self::Fractions => f.write_str("f32 from 0 to 1"),
            Self::Ids(below) => write!(f, "i64 below {below}"),
            Self::Mask => f.write_str("0 or 1"),
        }
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One dimension of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Dim {
    /// Any length but zero, the same wherever the letter stands among the inputs.
    Free(&'static str),
    /// This length.
    Size(usize),
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Free(letter) => f.write_str(letter),
            Self::Size(size) => write!(f, "{size}"),
        }
    }
}

/// A tensor that a network takes or gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    /// Its name in the file.
    pub name: &'static str,
    /// What its values are.
    #[serde(rename = "type")]
    pub content: Content,
    /// Its shape.
    pub shape: Vec<Dim>,
    /// Other shapes that are taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_shapes: Vec<Vec<Dim>>,
    /// Whether it may be left out.
    pub optional: bool,
}

impl Port {
    /// A tensor that has to be there.
    pub fn new(name: &'static str, content: Content, shape: impl Into<Vec<Dim>>) -> Self {
        Self {
            name,
            content,
            shape: shape.into(),
            other_shapes: Vec::new(),
            optional: false,
        }
    }

    /// A tensor of any numbers.
    pub fn numbers(name: &'static str, shape: impl Into<Vec<Dim>>) -> Self {
        Self::new(name, Content::Numbers, shape)
    }

    /// The same tensor, but it may be left out.
    #[must_use]
    pub fn optional(self) -> Self {
        Self {
            optional: true,
            ..self
        }
    }

    /// The same tensor, but it may also have this shape.
    #[must_use]
    pub fn or(mut self, shape: impl Into<Vec<Dim>>) -> Self {
        self.other_shapes.push(shape.into());
        self
    }

    /// The shapes as text, such as `[B, T, 64]`.
    pub fn shape_words(&self) -> String {
        let words = |shape: &Vec<Dim>| {
            let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
            format!("[{}]", dims.join(", "))
        };
        let all = std::iter::once(&self.shape).chain(&self.other_shapes);
        all.map(words).collect::<Vec<_>>().join(" or ")
    }
}

/// Tensors that passed the check: numbers and masks are f32, ids u32, all on the device of the network.
#[derive(Debug)]
pub struct Inputs {
    tensors: BTreeMap<String, Tensor>,
}

/// Length of a free dimension, and the input that it was first seen in.
type Lengths = HashMap<&'static str, (usize, &'static str)>;

impl Inputs {
    /// The tensor of this name, if it was given.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// It was not given; the check rules this out for inputs that are not optional.
    pub fn get(&self, name: &str) -> Result<&Tensor, NetworkError> {
        self.find(name).ok_or_else(|| format!("{name} is missing").into())
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Compares `tensors`, which lie on any device, with `ports` and brings them to `device`. The inner error says, in
    /// one line, everything that is wrong with them.
    pub(super) fn check(
        ports: &[Port],
        tensors: &BTreeMap<String, Tensor>,
        device: &Device,
    ) -> candle_core::Result<Result<Self, String>> {
        let known = || ports.iter().map(|port| port.name).collect::<Vec<_>>().join(", ");
        let mut faults = Vec::new();
        if tensors.is_empty() {
            faults.push(format!("found no tensors, known are {}", known()));
        }
        for name in tensors.keys() {
            if !ports.iter().any(|port| port.name == name) {
                faults.push(format!("{name} is unknown, known are {}", known()));
            }
        }
        let mut lengths = Lengths::new();
        let mut ready = BTreeMap::new();
        for port in ports {
            let name = port.name;
            let Some(tensor) = tensors.get(name) else {
                if !port.optional {
                    faults.push(format!("{name} is missing, expected {}", port.shape_words()));
                }
                continue;
            };
            if let Some(fault) = shape_fault(port, tensor.dims(), &mut lengths) {
                faults.push(fault);
                continue;
            }
            match convert(port.content, tensor)? {
                Ok(tensor) => {
                    ready.insert(name.to_owned(), tensor.to_device(device)?);
                }
                Err(fault) => faults.push(format!("{name} {fault}")),
            }
        }
        Ok(if faults.is_empty() {
            Ok(Self { tensors: ready })
        } else {
            Err(faults.join("; "))
        })
    }
}

fn shape_fault(port: &Port, found: &[usize], lengths: &mut Lengths) -> Option<String> {
    let fault = |more: String| {
        let expected = port.shape_words();
        Some(format!("{} is {found:?}, expected {expected}{more}", port.name))
    };
    let fits = |shape: &&Vec<Dim>| {
        let same = |(dim, &length): (&Dim, &usize)| match dim {
            Dim::Size(size) => *size == length,
            Dim::Free(_) => true,
        };
        shape.len() == found.len() && shape.iter().zip(found).all(same)
    };
    let Some(shape) = std::iter::once(&port.shape).chain(&port.other_shapes).find(fits) else {
        return fault(String::new());
    };
    for (dim, &length) in shape.iter().zip(found) {
        match dim {
            Dim::Size(_) => {}
            Dim::Free(letter) if length == 0 => return fault(format!(" with {letter} above 0")),
            Dim::Free(letter) => {
                let (expected, origin) = *lengths.entry(letter).or_insert((length, port.name));
                if expected != length {
                    return fault(format!(" with {letter} = {expected} as in {origin}"));
                }
            }
        }
    }
    None
}

/// The tensor in the type that networks work in, or what is wrong with its values.
fn convert(content: Content, tensor: &Tensor) -> candle_core::Result<Result<Tensor, String>> {
    let dtype = tensor.dtype();
    let whole = dtype.is_int();
    let wrong = |expected: &str| {
        let found = format!("{dtype:?}").to_lowercase();
        Ok(Err(format!("is {found}, expected {expected}")))
    };
    match content {
        Content::Numbers | Content::Fractions => {
            if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                return wrong("f32, f16 or bf16");
            }
            let tensor = tensor.to_dtype(DType::F32)?;
            if content == Content::Fractions {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                if let Some(value) = values.iter().find(|value| !(0.0..=1.0).contains(*value)) {
                    return Ok(Err(format!("holds {value}, expected values from 0 to 1")));
                }
            }
            Ok(Ok(tensor))
        }
        Content::Ids(below) => {
            if !whole {
                return wrong("i64 or u32");
            }
            let ids = tensor.to_dtype(DType::I64)?;
            let values = ids.flatten_all()?.to_vec1::<i64>()?;
            let odd = values
                .iter()
                .find(|&&id| usize::try_from(id).map_or(true, |id| id >= below));
            match odd {
                Some(id) => Ok(Err(format!("holds {id}, expected ids from 0 to below {below}"))),
                None => Ok(Ok(ids.to_dtype(DType::U32)?)),
            }
        }
        Content::Mask => {
            let mask = tensor.to_dtype(DType::F32)?;
            let values = mask.flatten_all()?.to_vec1::<f32>()?;
            match values.iter().find(|value| **value != 0.0 && **value != 1.0) {
                Some(value) => Ok(Err(format!("holds {value}, expected zeros and ones"))),
                None => Ok(Ok(mask)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Dim::{Free, Size};
    use super::*;

    fn ports() -> Vec<Port> {
        vec![
            Port::new("ids", Content::Ids(10), [Free("B"), Free("L")]),
            Port::new("mask", Content::Mask, [Free("B"), Free("L")]).optional(),
            Port::numbers("states", [Free("B"), Size(3)]),
            Port::new("time", Content::Fractions, [Free("B")]).optional(),
        ]
    }

    fn check(entries: &[(&str, Tensor)]) -> Result<Inputs, String> {
        let tensors = entries
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), tensor.clone()))
            .collect();
        Inputs::check(&ports(), &tensors, &Device::Cpu).unwrap()
    }

    fn filled(value: f64, shape: &[usize], dtype: DType) -> Tensor {
        let ones = Tensor::ones(shape, DType::F64, &Device::Cpu).unwrap();
        (ones * value).unwrap().to_dtype(dtype).unwrap()
    }

    #[test]
    fn inputs_come_out_in_the_types_that_networks_take() {
        let inputs = check(&[
            ("ids", filled(9.0, &[2, 4], DType::I64)),
            ("states", filled(0.5, &[2, 3], DType::BF16)),
            ("mask", filled(1.0, &[2, 4], DType::U8)),
        ])
        .unwrap();
        let dtype = |name: &str| inputs.get(name).unwrap().dtype();
        assert_eq!(
            [dtype("ids"), dtype("states"), dtype("mask")],
            [DType::U32, DType::F32, DType::F32]
        );
        assert!(inputs.find("time").is_none() && inputs.get("time").is_err());
    }

    #[test]
    fn a_tensor_may_have_one_of_several_shapes() {
        let port = [Port::numbers("x", [Free("B"), Size(3)]).or([Free("B"), Free("S"), Size(3)])];
        let run = |shape: &[usize]| {
            let tensors = BTreeMap::from([("x".to_owned(), filled(1.0, shape, DType::F32))]);
            Inputs::check(&port, &tensors, &Device::Cpu).unwrap().map(drop)
        };
        run(&[2, 3]).unwrap();
        run(&[2, 5, 3]).unwrap();
        assert_eq!(
            run(&[2, 4]).unwrap_err(),
            "x is [2, 4], expected [B, 3] or [B, S, 3]"
        );
        assert!(run(&[2, 0, 3]).unwrap_err().ends_with("with S above 0"));
    }

    #[test]
    fn everything_that_is_wrong_is_said_in_one_line() {
        let ids = || ("ids", filled(1.0, &[2, 4], DType::U32));
        let states = || ("states", filled(1.0, &[2, 3], DType::F32));
        type Case<'a> = (&'a [(&'a str, Tensor)], &'a [&'a str]);
        let cases: [Case<'_>; 10] = [
            (
                &[],
                &[
                    "no tensors",
                    "ids is missing, expected [B, L]",
                    "states is missing",
                ],
            ),
            (
                &[ids(), ("x", filled(1.0, &[1], DType::F32))],
                &[
                    "x is unknown, known are ids, mask, states, time",
                    "states is missing",
                ],
            ),
            (
                &[ids(), ("states", filled(1.0, &[2, 4], DType::F32))],
                &["states is [2, 4], expected [B, 3]"],
            ),
            (
                &[ids(), ("states", filled(1.0, &[3, 3], DType::F32))],
                &["states is [3, 3], expected [B, 3] with B = 2 as in ids"],
            ),
            (
                &[states(), ("ids", filled(1.0, &[2, 0], DType::I64))],
                &["ids is [2, 0], expected [B, L] with L above 0"],
            ),
            (
                &[states(), ("ids", filled(10.0, &[2, 1], DType::I64))],
                &["ids holds 10, expected ids from 0 to below 10"],
            ),
            (
                &[states(), ("ids", filled(-1.0, &[2, 1], DType::I64))],
                &["ids holds -1"],
            ),
            (
                &[states(), ("ids", filled(1.0, &[2, 1], DType::F32))],
                &["ids is f32, expected i64 or u32"],
            ),
            (
                &[ids(), states(), ("mask", filled(0.5, &[2, 4], DType::F16))],
                &["mask holds 0.5, expected zeros and ones"],
            ),
            (
                &[ids(), states(), ("time", filled(f64::NAN, &[2], DType::F32))],
                &["time holds NaN, expected values from 0 to 1"],
            ),
        ];
        for (entries, words) in cases {
            let line = check(entries).unwrap_err();
            assert!(
                words.iter().all(|word| line.contains(word)) && !line.contains('\n'),
                "{words:?}: {line}"
            );
        }
        let wide = ("states", filled(1.0, &[2, 3], DType::F64));
        assert!(
            check(&[ids(), wide])
                .unwrap_err()
                .contains("states is f64, expected f32")
        );
    }
}

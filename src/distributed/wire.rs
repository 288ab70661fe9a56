//! What goes over a connection: a header in JSON and the bytes of tensors, both behind their lengths.

use std::io::{self, Read, Write};

use candle_core::{DType, Device, Tensor};
use safetensors::View;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::communicator::Call;
use super::error::CommError;

/// Largest header.
const MOST_HEADER: usize = 1 << 16;
/// Largest tensors of a message together.
const MOST_BYTES: u64 = 1 << 36;

/// Type and shape of a tensor.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Shape {
    dtype: String,
    dims: Vec<usize>,
}

impl Shape {
    pub(super) fn of(tensor: &Tensor) -> Self {
        Self {
            dtype: tensor.dtype().as_str().to_owned(),
            dims: tensor.dims().to_vec(),
        }
    }

    fn dtype(&self) -> io::Result<DType> {
        self.dtype
            .parse()
            .map_err(|_| wrong(format!("element type `{}`", self.dtype)))
    }

    fn bytes(&self) -> io::Result<u64> {
        let size = self.dtype()?.size_in_bytes();
        let elements = self.dims.iter().try_fold(size, |all, &dim| all.checked_mul(dim));
        elements
            .map(|bytes| bytes as u64)
            .filter(|&bytes| bytes <= MOST_BYTES)
            .ok_or_else(|| wrong(format!("a tensor of {:?}", self.dims)))
    }

    /// Zeros of this shape.
    pub(super) fn zeros(&self) -> io::Result<Tensor> {
        self.bytes()?;
        Tensor::zeros(self.dims.as_slice(), self.dtype()?, &Device::Cpu).map_err(|e| wrong(e.to_string()))
    }
}

/// What a rank asks of rank 0.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    Hello {
        version: String,
        job: String,
        world: usize,
        rank: usize,
    },
    Start {
        id: u64,
        group: u32,
        call: Call,
    },
    Send {
        group: u32,
        to: usize,
    },
    Receive {
        id: u64,
        group: u32,
        from: usize,
        like: Shape,
    },
    Group {
        group: u32,
        of: u32,
        members: Vec<usize>,
    },
    Fail {
        reason: String,
    },
    /// The rank has done all it had to do.
    Bye,
}

/// What rank 0 answers.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Tell {
    Welcome { timeout_s: f64 },
    Refused { reason: String },
    Done { id: u64 },
    Failed { id: u64, error: CommError },
}

#[derive(Deserialize, Serialize)]
struct Header<M> {
    message: M,
    tensors: Vec<Shape>,
}

fn wrong(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

/// Writes a message with its tensors, which lie on the host.
pub(super) fn write<M: Serialize>(to: &mut impl Write, message: M, tensors: &[Tensor]) -> io::Result<()> {
    let header = Header {
        message,
        tensors: tensors.iter().map(Shape::of).collect(),
    };
    let header = serde_json::to_vec(&header)?;
    if header.len() > MOST_HEADER {
        return Err(wrong(format!("a header of {} bytes", header.len())));
    }
    to.write_all(&(header.len() as u32).to_le_bytes())?;
    to.write_all(&header)?;
    for tensor in tensors {
        to.write_all(&tensor.data())?;
    }
    to.flush()
}

/// Reads a message with its tensors.
pub(super) fn read<M: DeserializeOwned>(from: &mut impl Read) -> io::Result<(M, Vec<Tensor>)> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MOST_HEADER {
        return Err(wrong(format!(
            "a header of {length} bytes, expected at most {MOST_HEADER}"
        )));
    }
    let mut header = vec![0; length];
    from.read_exact(&mut header)?;
    let Header { message, tensors } = serde_json::from_slice::<Header<M>>(&header)?;
    let mut found = Vec::new();
    for shape in tensors {
        let expected = shape.bytes()?;
        let mut bytes = Vec::new();
        // Grows with what really comes.
        from.take(expected).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != expected {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let tensor = Tensor::from_raw_buffer(&bytes, shape.dtype()?, &shape.dims, &Device::Cpu);
        found.push(tensor.map_err(|error| wrong(error.to_string()))?);
    }
    Ok((message, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back() {
        let tensors = [
            Tensor::new(&[[1f32, -2.5], [0.0, f32::MAX]], &Device::Cpu).unwrap(),
            Tensor::new(&[1f64 / 3.0], &Device::Cpu).unwrap(),
            Tensor::new(7u32, &Device::Cpu).unwrap(),
        ];
        let mut bytes = Vec::new();
        write(&mut bytes, Tell::Done { id: 9 }, &tensors).unwrap();
        let (tell, found) = read::<Tell>(&mut bytes.as_slice()).unwrap();
        assert!(matches!(tell, Tell::Done { id: 9 }));
        for (found, expected) in found.iter().zip(&tensors) {
            assert_eq!(Shape::of(found), Shape::of(expected));
            assert_eq!(found.data(), expected.data());
        }
        // Cut short anywhere, it is no message.
        for length in 0..bytes.len() {
            assert!(read::<Tell>(&mut &bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn sizes_are_checked_before_there_is_memory_for_them() {
        let message = |tensors: &str| {
            let header = format!("{{\"message\":\"bye\",\"tensors\":[{tensors}]}}");
            let mut bytes = (header.len() as u32).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            read::<Ask>(&mut bytes.as_slice()).unwrap_err().to_string()
        };
        for (tensor, words) in [
            (
                "{\"dtype\":\"f32\",\"dims\":[1099511627776]}",
                "a tensor of [1099511627776]",
            ),
            (
                "{\"dtype\":\"f32\",\"dims\":[4294967296,4294967296,4294967296]}",
                "a tensor of [4294967296,",
            ),
            ("{\"dtype\":\"text\",\"dims\":[1]}", "element type `text`"),
        ] {
            let line = message(tensor);
            assert!(line.contains(words), "{line}");
        }
        let line = read::<Ask>(&mut &[255u8; 8][..]).unwrap_err().to_string();
        assert!(line.contains("a header of 4294967295 bytes"), "{line}");
    }
}

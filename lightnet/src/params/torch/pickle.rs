//! What a pickle of tensors says, without running anything.
//!
//! A pickle is a program for a stack machine. This reader knows the instructions that move data, and of the functions that a pickle may
//! name only those by which PyTorch and NumPy put arrays together. Objects of libraries that are known to write training checkpoints are
//! passed over, whatever they hold; any other name is refused before it could mean anything. Nested values lie in flat tables, so that
//! neither reading nor dropping them recurses.

use std::collections::HashMap;

/// Most instructions, values and memo entries.
const MOST_STEPS: usize = 1 << 24;
const MOST_VALUES: usize = 1 << 22;
/// Deepest nesting of containers.
const DEEPEST: u16 = 64;
/// Longest text.
const LONGEST_TEXT: usize = 1 << 20;
/// Largest integer of more than eight bytes that is skipped.
const LONGEST_NUMBER: usize = 1 << 10;

/// Type of the elements of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    fn of_storage(name: &str) -> Option<Self> {
        Some(match name {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::BF16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }
}

/// A name that a pickle may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    Dict,
    Size,
    Storage(Element),
    Tensor,
    Parameter,
    /// `_rebuild_from_type_v2(function, type, arguments, state)`.
    Typed,
    /// Arrays and numbers of NumPy, types and devices: nothing of them is kept.
    Other,
    /// A class of a library that writes training checkpoints: its objects say nothing about tensors.
    Foreign,
}

/// Libraries whose settings and callbacks lie in training checkpoints, beside the weights.
const FOREIGN: [&str; 9] = [
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "argparse",
    "typing",
    "pathlib",
    "datetime",
];
/// Classes of plain data.
const PLAIN: [&str; 14] = [
    "dict",
    "list",
    "tuple",
    "set",
    "frozenset",
    "int",
    "long",
    "float",
    "complex",
    "bool",
    "str",
    "unicode",
    "bytearray",
    "object",
];

impl Global {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::Dict,
            ("torch", "Size") => Self::Size,
            ("torch", storage) if storage.ends_with("Storage") => {
                Self::Storage(Element::of_storage(storage)?)
            }
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::Tensor,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Self::Parameter,
            ("torch._tensor", "_rebuild_from_type_v2") => Self::Typed,
            ("torch", "Tensor" | "device") | ("torch.nn.parameter", "Parameter" | "Buffer") => Self::Other,
            (
                "torch",
                "float64" | "float32" | "float16" | "bfloat16" | "int64" | "int32" | "int16" | "int8"
                | "uint8" | "bool",
            ) => Self::Other,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct" | "scalar")
            | ("numpy", "ndarray" | "dtype")
            | ("_codecs", "encode") => Self::Other,
            ("builtins" | "__builtin__", name) if PLAIN.contains(&name) => Self::Foreign,
            ("collections", "defaultdict" | "Counter" | "deque") => Self::Foreign,
            (module, _) => {
                let library = module.split('.').next().unwrap_or_default();
                return FOREIGN.contains(&library).then_some(Self::Foreign);
            }
        })
    }
}

/// A value; containers and texts are numbers of their tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// None, true, false, floats, bytes, and what is not kept.
    Other,
    Int(i64),
    Text(u32),
    Tuple(u32),
    List(u32),
    Dict(u32),
    Storage(u32),
    Tensor(u32),
    Global(u16),
    /// An object of a class that is passed over.
    Foreign,
}

/// Elements that lie in an entry of the archive.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub(super) element: Element,
    /// Name of the entry below `data/`.
    pub(super) key: String,
    /// How many elements.
    pub(super) count: u64,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) storage: u32,
    /// First element, sizes, and elements from one place to the next of each axis.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) stride: Vec<u64>,
}

struct Container<T> {
    items: Vec<T>,
    depth: u16,
}

/// What a pickle holds.
#[derive(Default)]
pub(super) struct Heap {
    texts: Vec<String>,
    tuples: Vec<Container<Value>>,
    lists: Vec<Container<Value>>,
    dicts: Vec<Container<(Value, Value)>>,
    storages: Vec<Storage>,
    views: Vec<View>,
    /// Everything that was made, to bound it.
    values: usize,
    globals: Vec<Global>,
}

impl Heap {
    pub(super) fn text(&self, value: Value) -> Option<&str> {
        match value {
            Value::Text(at) => Some(&self.texts[at as usize]),
            _ => None,
        }
    }

    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Dict(at) => Some(&self.dicts[at as usize].items),
            _ => None,
        }
    }

    pub(super) fn view(&self, value: Value) -> Option<&View> {
        match value {
            Value::Tensor(at) => Some(&self.views[at as usize]),
            _ => None,
        }
    }

    pub(super) fn storage(&self, view: &View) -> &Storage {
        &self.storages[view.storage as usize]
    }

    fn items(&self, value: Value) -> Option<&[Value]> {
        match value {
            Value::Tuple(at) => Some(&self.tuples[at as usize].items),
            Value::List(at) => Some(&self.lists[at as usize].items),
            _ => None,
        }
    }

    fn depth(&self, value: Value) -> u16 {
        match value {
            Value::Tuple(at) => self.tuples[at as usize].depth,
            Value::List(at) => self.lists[at as usize].depth,
            Value::Dict(at) => self.dicts[at as usize].depth,
            _ => 0,
        }
    }

    fn more(&mut self, count: usize) -> Result<(), String> {
        self.values += count;
        match self.values > MOST_VALUES {
            true => Err(format!("more than {MOST_VALUES} values")),
            false => Ok(()),
        }
    }

    /// One more than the deepest of `values`.
    fn above(&self, values: impl IntoIterator<Item = Value>) -> Result<u16, String> {
        let deepest = values.into_iter().map(|value| self.depth(value)).max();
        match deepest.unwrap_or(0) {
            depth if depth >= DEEPEST => Err(format!("containers nested more than {DEEPEST} deep")),
            depth => Ok(depth + 1),
        }
    }

    fn tuple(&mut self, items: Vec<Value>) -> Result<Value, String> {
        self.more(1 + items.len())?;
        let depth = self.above(items.iter().copied())?;
        self.tuples.push(Container { items, depth });
        Ok(Value::Tuple(self.tuples.len() as u32 - 1))
    }

    fn list(&mut self) -> Result<Value, String> {
        self.more(1)?;
        self.lists.push(Container {
            items: Vec::new(),
            depth: 1,
        });
        Ok(Value::List(self.lists.len() as u32 - 1))
    }

    fn new_dict(&mut self) -> Result<Value, String> {
        self.more(1)?;
        self.dicts.push(Container {
            items: Vec::new(),
            depth: 1,
        });
        Ok(Value::Dict(self.dicts.len() as u32 - 1))
    }

    fn new_text(&mut self, text: String) -> Result<Value, String> {
        self.more(1)?;
        self.texts.push(text);
        Ok(Value::Text(self.texts.len() as u32 - 1))
    }

    fn append(&mut self, list: Value, items: &[Value]) -> Result<(), String> {
        self.more(items.len())?;
        let depth = self.above(items.iter().copied())?;
        match list {
            Value::List(at) => {
                let list = &mut self.lists[at as usize];
                list.items.extend_from_slice(items);
                list.depth = list.depth.max(depth);
                Ok(())
            }
            Value::Other | Value::Foreign => Ok(()),
            _ => Err("items for what is no list".to_owned()),
        }
    }

    fn set_items(&mut self, dict: Value, items: &[Value]) -> Result<(), String> {
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".to_owned());
        }
        self.more(items.len())?;
        let depth = self.above(items.iter().copied())?;
        match dict {
            Value::Dict(at) => {
                let dict = &mut self.dicts[at as usize];
                dict.items
                    .extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                dict.depth = dict.depth.max(depth);
                Ok(())
            }
            Value::Other | Value::Foreign => Ok(()),
            _ => Err("keys for what is no dictionary".to_owned()),
        }
    }
}

/// Reads a pickle of protocol 2 to 5.
///
/// # Errors
/// It ends early, is too large or too deep, uses instructions of text or of objects, or names what is not allowed.
pub(super) fn read(bytes: &[u8]) -> Result<(Heap, Value), String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        heap: Heap::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let value = machine.run()?;
    Ok((machine.heap, value))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    heap: Heap,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value, String> {
        for _ in 0..MOST_STEPS {
            let code = self.take(1)?[0];
            match code {
                // PROTO, FRAME: nothing but headers.
                0x80 => match self.take(1)?[0] {
                    2..=5 => {}
                    version => return Err(format!("pickle protocol {version}, expected 2 to 5")),
                },
                0x95 => {
                    self.take(8)?;
                }
                b'.' => return self.pop(),
                b'(' => {
                    if self.marks.len() >= usize::from(DEEPEST) {
                        return Err(format!("containers nested more than {DEEPEST} deep"));
                    }
                    self.marks.push(self.stack.len());
                }
                // POP, POP_MARK, DUP
                b'0' => {
                    self.pop()?;
                }
                b'1' => {
                    self.since_mark()?;
                }
                b'2' => {
                    let top = self.top()?;
                    self.push(top)?;
                }
                // NONE, NEWTRUE, NEWFALSE, BINFLOAT
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other)?;
                }
                _ => self.step(code)?,
            }
        }
        Err(format!("more than {MOST_STEPS} instructions"))
    }

    /// The instructions that make numbers, texts and containers, that remember and that rebuild.
    fn step(&mut self, code: u8) -> Result<(), String> {
        match code {
            // BININT, BININT1, BININT2, LONG1, LONG4
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(i64::from(value)))
            }
            b'K' => {
                let value = self.take(1)?[0];
                self.push(Value::Int(i64::from(value)))
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(i64::from(value)))
            }
            0x8a | 0x8b => {
                let length = self.length(if code == 0x8a { 1 } else { 4 }, LONGEST_NUMBER)?;
                let value = long(self.take(length)?);
                self.push(value)
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, and the strings of Python 2
            b'X' | b'T' => self.string(4),
            0x8c | b'U' => self.string(1),
            0x8d => self.string(8),
            // BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8
            b'B' => self.blob(4),
            b'C' => self.blob(1),
            0x8e | 0x96 => self.blob(8),
            b')' => self.make(|heap| heap.tuple(Vec::new())),
            // TUPLE1 to TUPLE3, TUPLE
            0x85..=0x87 => {
                let first = self.above_mark(usize::from(code - 0x84))?;
                let items = self.stack.split_off(first);
                self.make(|heap| heap.tuple(items))
            }
            b't' => {
                let items = self.since_mark()?;
                self.make(|heap| heap.tuple(items))
            }
            b']' => self.make(Heap::list),
            b'}' => self.make(Heap::new_dict),
            // EMPTY_SET, ADDITEMS, FROZENSET
            0x8f => self.push(Value::Other),
            0x90 => {
                self.since_mark()?;
                self.top().map(drop)
            }
            0x91 => {
                self.since_mark()?;
                self.push(Value::Other)
            }
            b'a' => {
                let item = self.pop()?;
                let list = self.top()?;
                self.heap.append(list, &[item])
            }
            b'e' => {
                let items = self.since_mark()?;
                let list = self.top()?;
                self.heap.append(list, &items)
            }
            b's' => {
                let first = self.above_mark(2)?;
                let items = self.stack.split_off(first);
                let dict = self.top()?;
                self.heap.set_items(dict, &items)
            }
            b'u' => {
                let items = self.since_mark()?;
                let dict = self.top()?;
                self.heap.set_items(dict, &items)
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => {
                let at = u32::from(self.take(1)?[0]);
                self.remember(at)
            }
            b'r' => {
                let at = u32::from_le_bytes(self.array()?);
                self.remember(at)
            }
            0x94 => self.remember(self.memo.len() as u32),
            b'h' => {
                let at = u32::from(self.take(1)?[0]);
                self.recall(at)
            }
            b'j' => {
                let at = u32::from_le_bytes(self.array()?);
                self.recall(at)
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let module = self.line()?.to_owned();
                let name = self.line()?.to_owned();
                self.global(&module, &name)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let word = |value| self.heap.text(value).map(str::to_owned);
                let (Some(module), Some(name)) = (word(module), word(name)) else {
                    return Err("a name that is no text".to_owned());
                };
                self.global(&module, &name)
            }
            // BINPERSID, REDUCE, NEWOBJ, BUILD
            b'Q' => {
                let id = self.pop()?;
                let storage = self.persistent(id)?;
                self.push(storage)
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = self.call(function, arguments)?;
                self.push(value)
            }
            // The state of an ordered dictionary or an array says nothing about tensors.
            b'b' => {
                self.pop()?;
                self.top().map(drop)
            }
            _ => Err(format!(
                "instruction {code:#04x}, which a pickle of tensors does not need"
            )),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let Some(part) = rest.get(..count) else {
            return Err(format!("ends after {} bytes", self.bytes.len()));
        };
        self.at += count;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A length of `width` bytes, at most `most`, and not beyond the end.
    fn length(&mut self, width: usize, most: usize) -> Result<usize, String> {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(self.take(width)?);
        let length = u64::from_le_bytes(wide);
        let left = self.bytes.len() - self.at;
        match usize::try_from(length) {
            Ok(length) if length <= most.min(left) => Ok(length),
            _ => Err(format!("a length of {length}, with {left} bytes left")),
        }
    }

    fn string(&mut self, width: usize) -> Result<(), String> {
        let length = self.length(width, LONGEST_TEXT)?;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.make(|heap| heap.new_text(text))
    }

    fn blob(&mut self, width: usize) -> Result<(), String> {
        let length = self.length(width, usize::MAX)?;
        self.take(length)?;
        self.push(Value::Other)
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let near = &rest[..rest.len().min(256)];
        let Some(end) = near.iter().position(|&byte| byte == b'\n') else {
            return Err("a name of more than 255 bytes".to_owned());
        };
        self.at += end + 1;
        std::str::from_utf8(&near[..end]).map_err(|_| "a name that is no text".to_owned())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.stack.len() >= MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, of: impl FnOnce(&mut Heap) -> Result<Value, String>) -> Result<(), String> {
        let value = of(&mut self.heap)?;
        self.push(value)
    }

    /// Where the last `count` values begin, none of which lies below a mark.
    fn above_mark(&self, count: usize) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let first = self.stack.len().checked_sub(count);
        first
            .filter(|&first| first >= floor)
            .ok_or_else(|| "takes more values than there are".to_owned())
    }

    fn pop(&mut self) -> Result<Value, String> {
        let first = self.above_mark(1)?;
        let value = self.stack[first];
        self.stack.truncate(first);
        Ok(value)
    }

    fn top(&self) -> Result<Value, String> {
        self.above_mark(1).map(|first| self.stack[first])
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or("a container without a beginning")?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, at: u32) -> Result<(), String> {
        let top = self.top()?;
        if self.memo.len() >= MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        self.memo.insert(at, top);
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Result<(), String> {
        let Some(&value) = self.memo.get(&at) else {
            return Err(format!("value {at}, which was never remembered"));
        };
        self.push(value)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let Some(global) = Global::find(module, name) else {
            return Err(format!(
                "names {module}.{name}, which is no part of a tensor; nothing was run"
            ));
        };
        let globals = &mut self.heap.globals;
        let known = globals.iter().position(|&other| other == global);
        let at = known.unwrap_or_else(|| {
            globals.push(global);
            globals.len() - 1
        });
        // There are fewer globals than the table of known ones has rows.
        self.push(Value::Global(at as u16))
    }

    fn as_global(&self, value: Value) -> Option<Global> {
        match value {
            Value::Global(at) => self.heap.globals.get(usize::from(at)).copied(),
            _ => None,
        }
    }

    /// `("storage", type, key, device, count)`.
    fn persistent(&mut self, id: Value) -> Result<Value, String> {
        let storage = match self.heap.items(id) {
            Some(&[kind, class, key, _, Value::Int(count)]) => {
                let class = self.as_global(class);
                match (self.heap.text(kind), class, self.heap.text(key)) {
                    (Some("storage"), Some(Global::Storage(element)), Some(key)) if count >= 0 => {
                        Some(Storage {
                            element,
                            key: key.to_owned(),
                            count: count.unsigned_abs(),
                        })
                    }
                    _ => None,
                }
            }
            _ => None,
        };
        let storage = storage.ok_or("a reference to what is no typed storage")?;
        self.heap.more(1)?;
        self.heap.storages.push(storage);
        Ok(Value::Storage(self.heap.storages.len() as u32 - 1))
    }

    fn call(&mut self, function: Value, arguments: Value) -> Result<Value, String> {
        let Some(given) = self.heap.items(arguments) else {
            return Err("arguments that are no tuple".to_owned());
        };
        match self.as_global(function) {
            Some(Global::Dict) => {
                let pairs: Vec<Value> = match given.first() {
                    Some(&pairs) => {
                        let pairs = self.heap.items(pairs).unwrap_or_default();
                        pairs
                            .iter()
                            .filter_map(|&pair| self.heap.items(pair))
                            .flatten()
                            .copied()
                            .collect()
                    }
                    None => Vec::new(),
                };
                let dict = self.heap.new_dict()?;
                self.heap.set_items(dict, &pairs)?;
                Ok(dict)
            }
            Some(Global::Size) => match given.first() {
                Some(&sizes) if self.heap.items(sizes).is_some() => Ok(sizes),
                _ => Ok(arguments),
            },
            Some(Global::Tensor) => self.tensor(arguments),
            Some(Global::Parameter) => match given.first() {
                Some(&tensor @ Value::Tensor(_)) => Ok(tensor),
                _ => Err("a parameter that is no tensor".to_owned()),
            },
            Some(Global::Typed) => match *given {
                [rebuild, _, arguments, ..] if self.as_global(rebuild) == Some(Global::Tensor) => {
                    self.tensor(arguments)
                }
                _ => Err("a tensor of a type that is not known".to_owned()),
            },
            Some(Global::Other) => Ok(Value::Other),
            Some(Global::Foreign) => Ok(Value::Foreign),
            Some(Global::Storage(_)) | None => Err("a call of what is no function".to_owned()),
        }
    }

    /// `(storage, offset, sizes, strides, ..)`.
    fn tensor(&mut self, arguments: Value) -> Result<Value, String> {
        let whole = |value: Value| match value {
            Value::Int(n) => u64::try_from(n).ok(),
            _ => None,
        };
        let list = |value: Value| -> Option<Vec<u64>> {
            self.heap.items(value)?.iter().map(|&n| whole(n)).collect()
        };
        let view = match self.heap.items(arguments) {
            Some(&[Value::Storage(storage), offset, sizes, strides, ..]) => {
                match (whole(offset), list(sizes), list(strides)) {
                    (Some(offset), Some(shape), Some(stride)) if shape.len() == stride.len() => Some(View {
                        storage,
                        offset,
                        shape,
                        stride,
                    }),
                    _ => None,
                }
            }
            _ => None,
        };
        let view =
            view.ok_or("a tensor without a storage, or with sizes and strides that do not fit each other")?;
        self.heap.more(1 + view.shape.len())?;
        self.heap.views.push(view);
        Ok(Value::Tensor(self.heap.views.len() as u32 - 1))
    }
}

/// A little-endian two's complement number; none of more than eight bytes is kept.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Other;
    }
    let fill = match bytes.last() {
        Some(last) if last & 0x80 != 0 => 0xff,
        _ => 0,
    };
    let mut wide = [fill; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

//! `fulgur forward --op`: operators on named tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur::kernels::philox::Philox;

use crate::support::{Ran, names, run};

const OP: &str = "lightnet-noncausal";

fn forward(inputs: &Path, out: &Path) -> Ran {
    operate(OP, inputs, out)
}

fn operate(op: &str, inputs: &Path, out: &Path) -> Ran {
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    run([
        "forward",
        "--op",
        op,
        "--inputs",
        &path(inputs),
        "--out",
        &path(out),
        "--json",
        "-q",
    ])
}

/// Normal numbers in this shape, from a stream of their own.
fn random(shape: (usize, usize, usize, usize), stream: u64) -> Tensor {
    let values = Philox::new(7, stream).normals(shape.0 * shape.1 * shape.2 * shape.3);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// `sum_n softmax over n of g [n, d] v [n, e]`, one batch entry and head at a time, in f64.
fn state(g: &Tensor, v: &Tensor) -> Vec<f64> {
    let read = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let (g, v) = (read(g), read(v));
    let (width, value_width) = (g[0].len(), v[0].len());
    let mut state = vec![0.0; width * value_width];
    for d in 0..width {
        let total: f64 = g.iter().map(|row| row[d].exp()).sum();
        for (g, v) in g.iter().zip(&v) {
            for e in 0..value_width {
                state[d * value_width + e] += g[d].exp() / total * v[e];
            }
        }
    }
    state
}

#[test]
fn an_operator_answers_with_outputs_and_gradients() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let (q, g, v) = (
        random((2, 7, 3, 4), 0),
        random((2, 7, 3, 4), 1),
        random((2, 7, 3, 5), 2),
    );
    save(
        &inputs,
        &[
            ("q", q),
            ("g", g.clone()),
            ("v", v.clone()),
            ("do", random((2, 7, 3, 5), 3)),
        ],
    );
    let ran = forward(&inputs, &out);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let report = ran.json();
    let expected = [
        ("o", vec![2, 7, 3, 5]),
        ("state", vec![2, 3, 4, 5]),
        ("dq", vec![2, 7, 3, 4]),
        ("dg", vec![2, 7, 3, 4]),
        ("dv", vec![2, 7, 3, 5]),
    ];
    let written: BTreeMap<_, _> = candle_core::safetensors::load(&out, &Device::Cpu)
        .unwrap()
        .into_iter()
        .collect();
    assert_eq!(written.len(), expected.len());
    for (name, shape) in expected {
        assert_eq!(report["outputs"][name], serde_json::json!(shape), "{report}");
        assert_eq!(
            (written[name].dims(), written[name].dtype()),
            (&shape[..], DType::F32),
            "{name}"
        );
    }
    for (batch, head) in [(0, 0), (1, 2)] {
        let slice = |t: &Tensor| {
            t.get(batch)
                .unwrap()
                .narrow(1, head, 1)
                .unwrap()
                .squeeze(1)
                .unwrap()
        };
        let found = written["state"]
            .get(batch)
            .unwrap()
            .get(head)
            .unwrap()
            .flatten_all()
            .unwrap();
        for (found, expected) in found
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .zip(state(&slice(&g), &slice(&v)))
        {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-5,
                "{found} is not {expected}"
            );
        }
    }
    assert_eq!(names(folder.path()), ["in.safetensors", "out.safetensors"]);
}

/// `S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`, token after token.
#[test]
fn causal_operators_follow_the_recurrence() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let (n, h, d, e) = (5, 2, 3, 4);
    let (q, k, v) = (
        random((1, n, h, d), 0),
        random((1, n, h, d), 1),
        random((1, n, h, e), 2),
    );
    let rate = Tensor::new(&[0.1f32, 0.7], &Device::Cpu).unwrap();
    let g = (random((1, n, h, d), 3).sqr().unwrap() * -0.3).unwrap();
    let state_in = random((1, h, d, e), 4);
    for (op, name, decay) in [("scalar-decay", "rate", &rate), ("vector-decay", "g", &g)] {
        let d_o = random((1, n, h, e), 5);
        save(
            &inputs,
            &[
                ("q", q.clone()),
                ("k", k.clone()),
                ("v", v.clone()),
                (name, decay.clone()),
                ("state_in", state_in.clone()),
                ("do", d_o),
            ],
        );
        let ran = operate(op, &inputs, &out);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{op}");
        let written = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
        let mut given: Vec<_> = written.keys().map(String::as_str).collect();
        given.sort_unstable();
        let d_decay = format!("d{name}");
        let mut expected = ["o", "state", "dq", "dk", "dv", "dstate_in", &d_decay];
        expected.sort_unstable();
        assert_eq!(given, expected, "{op}");

        let read = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (q, k, v, decay) = (read(&q), read(&k), read(&v), read(decay));
        let (mut state, mut o) = (read(&state_in), vec![0f32; n * h * e]);
        for t in 0..n {
            for head in 0..h {
                let row = t * h + head;
                for i in 0..d {
                    let log = if name == "rate" {
                        -decay[head]
                    } else {
                        decay[row * d + i]
                    };
                    for j in 0..e {
                        let s = &mut state[(head * d + i) * e + j];
                        *s = *s * log.exp() + k[row * d + i] * v[row * e + j];
                        o[row * e + j] += *s * q[row * d + i];
                    }
                }
            }
        }
        for (name, expected) in [("o", o), ("state", state)] {
            for (found, expected) in read(&written[name]).iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-5,
                    "{op} {name}: {found} is not {expected}"
                );
            }
        }
    }
}

#[test]
fn half_precision_inputs_give_f32_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    for dtype in [DType::F16, DType::BF16] {
        let tensor = |stream| random((1, 3, 1, 2), stream).to_dtype(dtype).unwrap();
        save(&inputs, &[("q", tensor(0)), ("g", tensor(1)), ("v", tensor(2))]);
        let ran = forward(&inputs, &out);
        assert_eq!(
            ran.json()["outputs"]["o"],
            serde_json::json!([1, 3, 1, 2]),
            "{}",
            ran.stderr
        );
        let written = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
        assert!(
            written.len() == 2 && written.values().all(|tensor| tensor.dtype() == DType::F32),
            "{dtype:?}"
        );
    }
}

#[test]
fn bad_inputs_are_refused_in_one_line_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let out = file("out.safetensors");
    let refused = |inputs: &Path, words: &str| {
        let ran = forward(inputs, &out);
        assert!(ran.error().contains(words), "{words}: {}", ran.stderr);
        assert!(!out.exists());
    };
    refused(&file("absent.safetensors"), "absent.safetensors: No such file");

    std::fs::write(file("text.safetensors"), "this is no file of tensors").unwrap();
    refused(
        &file("text.safetensors"),
        "text.safetensors: not a usable safetensors file",
    );

    let (q, v) = (random((1, 3, 1, 2), 0), random((1, 3, 1, 2), 1));
    save(
        &file("whole.safetensors"),
        &[("q", q.clone()), ("g", q.clone()), ("v", v)],
    );
    let bytes = std::fs::read(file("whole.safetensors")).unwrap();
    std::fs::write(file("cut.safetensors"), &bytes[..bytes.len() - 8]).unwrap();
    refused(
        &file("cut.safetensors"),
        "cut.safetensors: not a usable safetensors file",
    );

    save(&file("few.safetensors"), &[("q", q.clone()), ("g", q.clone())]);
    refused(&file("few.safetensors"), "v is missing");

    save(
        &file("odd.safetensors"),
        &[("q", q.clone()), ("g", q), ("v", random((1, 4, 1, 2), 0))],
    );
    refused(&file("odd.safetensors"), "v is [1, 4, 1, 2]");
}

#[test]
fn an_output_that_cannot_be_written_is_found_first() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.safetensors");
    let ran = forward(&absent, &folder.path().join("none/out.safetensors"));
    assert!(ran.error().contains("there is no folder"), "{}", ran.stderr);
    let ran = forward(&absent, folder.path());
    assert!(ran.error().contains("not a regular file"), "{}", ran.stderr);
}

/// The causal form of LightNet: means of the values so far, weighed by logits.
#[test]
fn the_causal_form_of_lightnet_reads_what_came_before() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (folder.path().join("in"), folder.path().join("out"));
    let (n, d, e) = (5, 3, 2);
    let [q, g] = [1, 2].map(|stream| random((1, n, 1, d), stream));
    let v = random((1, n, 1, e), 3);
    save(
        &inputs,
        &[
            ("q", q.clone()),
            ("g", g.clone()),
            ("v", v.clone()),
            ("do", v.clone()),
        ],
    );
    let ran = operate("lightnet-causal", &inputs, &out);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let written = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
    let mut given: Vec<_> = written.keys().map(String::as_str).collect();
    given.sort_unstable();
    assert_eq!(given, ["dg", "dq", "dv", "log_sum", "o", "state"]);
    let read = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (q, g, v) = (read(&q), read(&g), read(&v));
    let mut expected = vec![0f32; n * e];
    for t in 0..n {
        for c in 0..d {
            let weight = |s: usize| g[s * d + c].exp();
            let total: f32 = (0..=t).map(weight).sum();
            for i in 0..e {
                let mean: f32 = (0..=t).map(|s| weight(s) * v[s * e + i]).sum::<f32>() / total;
                expected[t * e + i] += q[t * d + c] * mean;
            }
        }
    }
    for (found, expected) in read(&written["o"]).iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn the_environment_asks_which_kernels_run() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (folder.path().join("in"), folder.path().join("out"));
    let x = random((1, 4, 1, 2), 1);
    save(&inputs, &[("q", x.clone()), ("k", x.clone()), ("v", x)]);
    let ask = |wanted: &str| {
        let mut command = crate::support::fulgur();
        command
            .env("FULGUR_LOG", wanted)
            .args(["forward", "--op", "scalar-decay", "--json", "-q"]);
        command.arg("--inputs").arg(&inputs).arg("--out").arg(&out);
        Ran::of(command.output().unwrap())
    };
    let ran = ask("fulgur_kernels=debug");
    assert!(
        ran.stderr.contains("decay::causal") && ran.stderr.contains("chunks on the CPU"),
        "{}",
        ran.stderr
    );
    ran.json();
    assert_eq!(ask("off").stderr, "");
    assert!(ask("fulgur_kernels=loud").error().contains("FULGUR_LOG"));
}

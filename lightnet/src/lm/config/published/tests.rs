use super::*;

fn read(text: &str) -> Result<Config, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

#[test]
fn what_is_written_reads_as_it_was() {
    for kind in Architecture::ALL {
        let heads = if kind == Architecture::Hgrn1 { 64 } else { 2 };
        let mut config = Config {
            hidden_size: 64,
            num_attention_heads: heads,
            head_dim: Some(64 / heads),
            num_key_value_heads: (kind == Architecture::Llama).then_some(1),
            value_dim: (kind == Architecture::Transnormer).then_some(64),
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            ..Config::of(kind)
        };
        if matches!(kind, Architecture::Hgrn2 | Architecture::Lightnet) {
            config.output_norm_eps = Some(1e-5);
            config.gate_low_rank_dim = Some(32);
        }
        if matches!(kind, Architecture::Tnl | Architecture::Cosformer2) {
            config.gate_low_rank_dim = Some(32);
            config.gate_first = true;
            config.decay_schedule = DecaySchedule::Log;
            config.conv_size = Some(3);
        }
        if kind != Architecture::Llama {
            config.attn = vec![SoftmaxLayers {
                layers: vec![1],
                num_heads: 4,
                num_kv_heads: Some(2),
                qkv_bias: true,
                window_size: None,
                rope_theta: 500.0,
            }];
        }
        if kind == Architecture::Hgrn2 {
            // What is not written is what the library takes.
            config.gate_low_rank_dim = Some(128);
            config.head_dim = Some(5);
        }
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(read(&text).unwrap(), config, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["model_type"], kind.name());
    }
}

#[test]
fn absent_keys_are_what_libraries_take() {
    let llama = read(r#"{"model_type": "llama"}"#).unwrap();
    let sizes = (llama.vocab_size, llama.hidden_size, llama.intermediate_size);
    assert_eq!((sizes, llama.num_attention_heads), ((32000, 4096, 11008), 32));
    let hgrn2 = read(r#"{"model_type": "hgrn2", "hidden_size": 1024, "norm_eps": 1e-3, "num_heads": 3}"#);
    let words = hgrn2.unwrap_err();
    assert!(
        words.contains("hidden_size is 1024, expected a multiple of num_heads, 3"),
        "{words}"
    );
    let hgrn2 =
        read(r#"{"model_type": "hgrn2", "hidden_size": 1024, "norm_eps": 1e-3, "num_heads": null}"#).unwrap();
    assert_eq!((hgrn2.num_attention_heads, hgrn2.head_width()), (8, 128));
    assert_eq!((hgrn2.intermediate_size, hgrn2.output_eps()), (2816, 1e-5));
    let lightnet =
        read(r#"{"model_type": "lightnet", "hidden_size": 96, "num_heads": 3, "expand_ratio": 8}"#).unwrap();
    assert_eq!((lightnet.key_size(), lightnet.value_size()), (24, 96));
    assert_eq!(
        (lightnet.output_gate, lightnet.gate_rank()),
        (OutputGate::Silu, 128)
    );
    // HGRN2 goes by its expand ratio.
    let hgrn2 =
        read(r#"{"model_type": "hgrn2", "hidden_size": 96, "num_heads": 3, "expand_ratio": 8}"#).unwrap();
    assert_eq!(hgrn2.num_attention_heads, 12);
    let text = r#"{"model_type": "transnormer", "decoder_embed_dim": 64, "decoder_layers": 3, "glu_dim": -1,
                   "linear_use_lrpe_list": [1, 0, 1], "no_scale_embedding": true}"#;
    let transnormer = read(text).unwrap();
    assert_eq!(transnormer.lrpe_layers, [0, 2]);
    assert!(!transnormer.scale_embedding && transnormer.tie_word_embeddings);
    assert_eq!((transnormer.intermediate_size, transnormer.head_width()), (64, 8));
}

#[test]
fn what_is_not_supported_is_named() {
    let rest = r#""hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9"#;
    for (kind, more, words) in [
        ("llama", r#""hidden_act": "gelu""#, "hidden_act is \"gelu\""),
        (
            "llama",
            r#""rope_scaling": {"type": "dynamic", "factor": 2.0}"#,
            "rope_type is \"dynamic\"",
        ),
        (
            "llama",
            r#""partial_rotary_factor": 0.5"#,
            "partial_rotary_factor is 0.5",
        ),
        (
            "llama",
            r#""quantization_config": {"bits": 4}"#,
            "quantization_config is",
        ),
        ("hgrn2", r#""hidden_act": "powlu""#, "hidden_act is \"powlu\""),
        ("hgrn2", r#""attnres_block_size": 4"#, "attnres_block_size is 4"),
        (
            "hgrn2",
            r#""use_short_conv": true, "share_conv_kernel": true"#,
            "share_conv_kernel is true",
        ),
        (
            "hgrn2",
            r#""expand_ratio": 128"#,
            "expand_ratio is 128, expected 1 to hidden_size, 64",
        ),
        ("hgrn2", r#""expand_ratio": 0"#, "head_dim is 0"),
        (
            "lightnet",
            r#""num_heads": 3, "expand_ratio": 8"#,
            "hidden_size is 64",
        ),
        (
            "lightnet",
            r#""num_heads": 2, "attn": {"layers": [5], "num_heads": 2}"#,
            "attn.layers names layer 5",
        ),
        (
            "lightnet",
            r#""num_heads": 2, "attn": [{"layers": [1], "num_heads": 2, "window_size": 8}]"#,
            "attn.window_size is 8",
        ),
        (
            "transnormer",
            r#""norm_type": "layernorm""#,
            "norm_type is \"layernorm\"",
        ),
        (
            "transnormer",
            r#""linear_use_lrpe_list": [1]"#,
            "linear_use_lrpe_list has 1 entries",
        ),
        (
            "tnl",
            r#""intermediate_size": 8"#,
            "num_attention_heads is missing",
        ),
        ("gpt", r#""n": 1"#, "unknown variant `gpt`, expected one of `tnl`"),
    ] {
        let text = format!(r#"{{"model_type": "{kind}", {rest}, {more}}}"#);
        let line = match read(&text) {
            Ok(config) => config.check().unwrap_err().to_string(),
            Err(line) => line,
        };
        assert!(line.lines().next().unwrap().contains(words), "{words}: {line}");
    }
}

/// Whatever a file says, there is a model or a line about it, and no memory is taken.
#[test]
fn any_value_of_any_key_is_answered() {
    let values = [
        "null",
        "true",
        "0",
        "1",
        "3",
        "-1",
        "-3",
        "0.5",
        "1e300",
        "4096",
        "16384",
        "16777216",
        "9223372036854775807",
        "18446744073709551615",
        "[]",
        "[0]",
        "[1, 1]",
        "[9223372036854775807]",
        "{}",
        "\"\"",
        "\"none\"",
        r#"{"layers": [0, 1], "num_heads": 0}"#,
        r#"{"layers": [0], "num_heads": 18446744073709551615}"#,
        r#"[{"layers": [0], "num_heads": 2, "rope_theta": -1}]"#,
        r#"{"rope_type": "llama3", "factor": 0}"#,
    ];
    let (mut models, mut lines) = (0, 0);
    for kind in Architecture::ALL {
        let base = Config {
            vocab_size: 9,
            hidden_size: 8,
            intermediate_size: 8,
            num_hidden_layers: 2,
            num_attention_heads: if kind == Architecture::Hgrn1 { 8 } else { 2 },
            head_dim: (kind == Architecture::Hgrn1).then_some(1),
            ..Config::of(kind)
        };
        let base = serde_json::to_value(&base).unwrap();
        for key in KEYS {
            for value in values {
                let mut file = base.clone();
                file[key] = serde_json::from_str(value).unwrap();
                let shapes = serde_json::from_value::<Config>(file)
                    .map_err(|e| e.to_string())
                    .and_then(|config| crate::lm::expected_shapes(&config).map_err(|e| e.to_string()));
                match shapes {
                    Ok(shapes) => {
                        assert!(shapes.len() > 5, "{key} {value}");
                        models += 1;
                    }
                    Err(line) => {
                        assert!(!line.is_empty());
                        lines += 1;
                    }
                }
            }
        }
    }
    assert!(models > 1000 && lines > 1000, "{models} models, {lines} lines");
}

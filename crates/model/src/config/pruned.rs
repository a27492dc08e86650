//! The shape of a student that is cut out of its teacher.

use retort_core::{
    Code, Error, Result,
    spec::{Layers, Prune},
};

use super::Config;

impl Config {
    /// The shape that `prune` leaves of this one. `SpecInvalid` where it asks for more than there is, naming
    /// the key.
    pub fn pruned(&self, prune: &Prune) -> Result<Self> {
        let num_hidden_layers = match &prune.layers {
            None => self.num_hidden_layers,
            Some(Layers::Count(layers)) => {
                self.at_most("layers", (*layers).into(), "layers", self.num_hidden_layers)?
            }
            Some(Layers::These(layers)) => {
                let last = layers.last().copied().unwrap_or(0);
                if i64::from(last) >= self.num_hidden_layers {
                    return Err(invalid(format!(
                        "student.init.prune.layers names layer {last}; the teacher has {} layers, 0 to {}",
                        self.num_hidden_layers,
                        self.num_hidden_layers - 1
                    )));
                }
                layers.len() as i64
            }
        };
        let size = |key: &str, wanted: Option<u32>, what: &str, has: i64| match wanted {
            Some(wanted) => self.at_most(key, wanted.into(), what, has),
            None => Ok(has),
        };
        let hidden_size = size("hidden_size", prune.hidden_size, "hidden channels", self.hidden_size)?;
        let intermediate_size =
            size("intermediate_size", prune.intermediate_size, "intermediate channels", self.intermediate_size)?;
        let num_key_value_heads =
            size("num_key_value_heads", prune.num_key_value_heads, "key-value heads", self.num_key_value_heads)?;
        let group = self.num_attention_heads / self.num_key_value_heads;
        let num_attention_heads = match prune.num_attention_heads {
            None => num_key_value_heads * group,
            Some(heads) => {
                self.at_most("num_attention_heads", heads.into(), "attention heads", self.num_attention_heads)?
            }
        };
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(invalid(format!(
                "student.init.prune.num_attention_heads is {num_attention_heads}, no multiple of the student's \
                 {num_key_value_heads} key-value heads; give num_key_value_heads a number that divides it"
            )));
        }
        let kept = num_attention_heads / num_key_value_heads;
        if kept > group {
            return Err(invalid(format!(
                "student.init.prune leaves {kept} attention heads to a key-value head, the teacher has {group}; \
                 keep fewer attention heads, or more key-value heads"
            )));
        }
        Ok(Self { num_hidden_layers, intermediate_size, num_attention_heads, num_key_value_heads, ..self.clone() }
            .of_width(hidden_size))
    }

    /// With so many hidden channels, and an epsilon that stands to the mean square of the fewer as it stood to
    /// that of all, if those left out are zero.
    pub fn of_width(self, hidden_size: i64) -> Self {
        let widened = self.hidden_size as f64 / hidden_size.max(1) as f64;
        Self { hidden_size, rms_norm_eps: self.rms_norm_eps * widened, ..self }
    }

    fn at_most(&self, key: &str, wanted: i64, what: &str, has: i64) -> Result<i64> {
        if (1..=has).contains(&wanted) {
            return Ok(wanted);
        }
        Err(invalid(format!("student.init.prune.{key} is {wanted}; the teacher has {has} {what} to keep")))
    }
}

fn invalid(message: String) -> Error {
    Error::new(Code::SpecInvalid, message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn teacher() -> Config {
        let value = json!({
            "model_type": "llama", "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 6,
            "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 10, "rms_norm_eps": 1e-5,
        });
        Config::from_json(&"config.json", &value).unwrap()
    }

    fn shape(config: &Config) -> [i64; 6] {
        let Config { num_hidden_layers, hidden_size, intermediate_size, head_dim, .. } = *config;
        [
            num_hidden_layers,
            hidden_size,
            intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
        ]
    }

    #[test]
    fn what_is_not_named_stays() {
        let teacher = teacher();
        assert_eq!(teacher.pruned(&Prune::to_layers(6)).unwrap(), teacher);
        let shape_of = |prune: Prune| shape(&teacher.pruned(&prune).unwrap());
        assert_eq!(shape_of(Prune::to_layers(2)), [2, 96, 64, 12, 4, 8]);
        let these = Prune { layers: Some(Layers::These(vec![0, 4, 5])), ..Prune::default() };
        assert_eq!(shape_of(these), [3, 96, 64, 12, 4, 8]);
        let two_groups = Prune { num_key_value_heads: Some(2), ..Prune::default() };
        assert_eq!(shape_of(two_groups), [6, 96, 64, 6, 2, 8]);
        let thinner = Prune { num_attention_heads: Some(8), hidden_size: Some(50), ..Prune::default() };
        assert_eq!(shape_of(thinner.clone()), [6, 50, 64, 8, 4, 8]);
        let epsilon = teacher.pruned(&thinner).unwrap().rms_norm_eps;
        assert!((epsilon - 1e-5 * 96.0 / 50.0).abs() < 1e-12, "{epsilon}");
    }

    #[test]
    fn more_than_the_teacher_has_is_refused_by_its_key() {
        let refuse = |prune: Prune, expected: &str| {
            let error = teacher().pruned(&prune).unwrap_err();
            assert_eq!(error.code, Code::SpecInvalid);
            assert!(error.message.contains(expected), "{}", error.message);
        };
        let base = Prune::default;
        refuse(Prune::to_layers(7), "student.init.prune.layers is 7; the teacher has 6 layers to keep");
        refuse(
            Prune { layers: Some(Layers::These(vec![1, 6])), ..base() },
            "names layer 6; the teacher has 6 layers, 0 to 5",
        );
        refuse(Prune { hidden_size: Some(97), ..base() }, "hidden_size is 97; the teacher has 96 hidden channels");
        refuse(Prune { intermediate_size: Some(65), ..base() }, "intermediate_size is 65; the teacher has 64");
        refuse(Prune { num_attention_heads: Some(13), ..base() }, "num_attention_heads is 13; the teacher has 12");
        refuse(Prune { num_key_value_heads: Some(5), ..base() }, "num_key_value_heads is 5; the teacher has 4");
        refuse(
            Prune { num_attention_heads: Some(6), ..base() },
            "no multiple of the student's 4 key-value heads; give",
        );
        refuse(
            Prune { num_attention_heads: Some(8), num_key_value_heads: Some(2), ..base() },
            "leaves 4 attention heads to a key-value head, the teacher has 3; keep fewer",
        );
    }
}

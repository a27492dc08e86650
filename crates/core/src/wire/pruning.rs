//! [`Pruning`] <-> `retort.v1.Pruning`.

use retort_proto as proto;

use crate::{
    Code, Error, Result,
    pruning::{Axis, Layer, MAX_LAYERS, Pruning},
};

/// Reads a pruning; a share or an influence that is not finite counts as not measured.
pub fn pruning_from_proto(pruning: &proto::Pruning) -> Result<Pruning> {
    if pruning.layers.len() > MAX_LAYERS {
        let message = format!("a pruning of {} layers; at most {MAX_LAYERS}", pruning.layers.len());
        return Err(Error::new(Code::RequestInvalid, message));
    }
    let layer = |layer: &proto::PrunedLayer| Layer {
        layer: layer.layer,
        influence: finite(layer.influence),
        attention_heads_share: finite(layer.attention_heads_share),
        intermediate_share: finite(layer.intermediate_share),
    };
    let axis = |axis: Option<&proto::PrunedAxis>| {
        axis.map_or_else(Axis::default, |axis| Axis { kept: axis.kept, of: axis.of, share: finite(axis.share) })
    };
    Ok(Pruning {
        layers: pruning.layers.iter().map(layer).collect(),
        depth: axis(pruning.depth.as_ref()),
        hidden: axis(pruning.hidden.as_ref()),
        intermediate: axis(pruning.intermediate.as_ref()),
        attention_heads: axis(pruning.attention_heads.as_ref()),
        key_value_heads: axis(pruning.key_value_heads.as_ref()),
        calibration_rows: pruning.calibration_rows,
        calibration_tokens: pruning.calibration_tokens,
    })
}

pub fn pruning_to_proto(pruning: &Pruning) -> proto::Pruning {
    let layer = |layer: &Layer| proto::PrunedLayer {
        layer: layer.layer,
        influence: layer.influence,
        attention_heads_share: layer.attention_heads_share,
        intermediate_share: layer.intermediate_share,
    };
    let axis = |axis: Axis| Some(proto::PrunedAxis { kept: axis.kept, of: axis.of, share: axis.share });
    proto::Pruning {
        layers: pruning.layers.iter().map(layer).collect(),
        depth: axis(pruning.depth),
        hidden: axis(pruning.hidden),
        intermediate: axis(pruning.intermediate),
        attention_heads: axis(pruning.attention_heads),
        key_value_heads: axis(pruning.key_value_heads),
        calibration_rows: pruning.calibration_rows,
        calibration_tokens: pruning.calibration_tokens,
    }
}

fn finite(number: Option<f64>) -> Option<f64> {
    number.filter(|number| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pruning() -> Pruning {
        let layer =
            |layer| Layer { layer, influence: Some(0.25), attention_heads_share: Some(0.75), intermediate_share: None };
        let axis = |kept, of, share| Axis { kept, of, share };
        Pruning {
            layers: vec![layer(0), layer(3)],
            depth: axis(2, 4, Some(0.5)),
            hidden: axis(8, 8, None),
            intermediate: axis(9, 10, Some(0.875)),
            attention_heads: axis(2, 4, Some(0.75)),
            key_value_heads: axis(1, 2, Some(0.5)),
            calibration_rows: 4,
            calibration_tokens: 100,
        }
    }

    #[test]
    fn a_pruning_survives_the_wire_and_json() {
        let pruning = pruning();
        assert_eq!(pruning_from_proto(&pruning_to_proto(&pruning)).unwrap(), pruning);
        let json = serde_json::to_string(&pruning).unwrap();
        assert_eq!(serde_json::from_str::<Pruning>(&json).unwrap(), pruning);
    }

    #[test]
    fn what_no_worker_measures_is_refused_or_left_out() {
        let mut sent = pruning_to_proto(&pruning());
        sent.layers[0].influence = Some(f64::NAN);
        assert_eq!(pruning_from_proto(&sent).unwrap().layers[0].influence, None);
        sent.layers = vec![proto::PrunedLayer::default(); MAX_LAYERS + 1];
        assert_eq!(pruning_from_proto(&sent).unwrap_err().code, Code::RequestInvalid);
    }
}

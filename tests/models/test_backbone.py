"""The trunk: what the classifier and the masked autoencoder share."""

import pytest
import torch

from pointewa.models import Architecture, MaskedAutoencoder, PointTransformerClassifier
from pointewa.models.backbone import PointTransformer
from pointewa.models.patch_embed import make_patches

SIZES = {"width": 24, "depth": 3, "heads": 2, "num_groups": 8, "group_size": 6, "patch_width": 8, "drop_path": 0.0}
MAE, BERT = Architecture(**SIZES, patch_out=24), Architecture(**SIZES, patch_out=16, head="point_bert")
BOTH = pytest.mark.parametrize("architecture", [MAE, BERT], ids=["point_mae", "point_bert"])


def built(architecture, class_token):
    torch.manual_seed(0)
    model = PointTransformer(architecture, class_token)
    model.initialize()
    return model.eval()


@BOTH
@pytest.mark.parametrize("class_token", [False, True])
def test_it_makes_a_token_of_each_patch_and_puts_the_class_token_first(architecture, class_token):
    model = built(architecture, class_token)
    patches, centers, _ = make_patches(torch.randn(3, 64, 3), 8, 6)
    tokens = model(patches, centers)
    assert tokens.shape == (3, 8 + class_token, 24)
    order = torch.randperm(8)  # tokens go with their patches, and the class token sees a set
    moved = model(patches[:, order], centers[:, order])
    torch.testing.assert_close(moved[:, class_token:], tokens[:, class_token:][:, order])
    torch.testing.assert_close(moved[:, :class_token], tokens[:, :class_token])
    assert {name for name, _ in model.named_parameters() if name.startswith("cls")} == (
        {"cls_token", "cls_pos"} if class_token else set()
    )
    if class_token:
        assert 0.01 < model.cls_token.std() < 0.03
        assert 0.01 < model.cls_pos.std() < 0.03


@BOTH
def test_the_classifier_and_the_autoencoder_stand_on_it(architecture):
    """With its weights, under their parameter names, both compute its tokens."""
    patches, centers, _ = make_patches(torch.randn(3, 64, 3), 8, 6)
    trunk, classifier = built(architecture, class_token=True), PointTransformerClassifier(architecture, 5).eval()
    head = {name for name in classifier.state_dict() if name.startswith("cls_head_finetune.")}
    assert set(classifier.state_dict()) - head == set(trunk.state_dict())
    classifier.load_state_dict(trunk.state_dict(), strict=False)
    tokens = trunk(patches, centers)
    pooled = torch.cat([tokens[:, 0], tokens[:, 1:].max(1).values], 1)
    assert torch.equal(classifier.encode(patches, centers), pooled)

    trunk, autoencoder = built(architecture, class_token=False), MaskedAutoencoder(architecture).eval()
    autoencoder.MAE_encoder.load_state_dict(trunk.state_dict())
    assert torch.equal(autoencoder.MAE_encoder(patches, centers), trunk(patches, centers))

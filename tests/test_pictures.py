"""Pictures: one scale for attention, every number of a log, names as a paper prints them."""

import os

import pytest
import torch

from twins import evaluation_pictures, pictures
from twins.evaluation_pictures import attention_picture, attention_tile, divergence_picture, pca_colours


def test_attention_has_one_colour_scale_and_uniform_is_white():
    uniform = torch.full((4, 4), 1 / 16)
    map_ = uniform.clone()
    map_[0, 0], map_[0, 1] = 2 / 16, 0
    tile = attention_tile(map_)
    assert tile[1, 1] == pytest.approx([0.97] * 3, abs=0.01)
    assert tile[0, 0, 0] > tile[0, 0, 2] and tile[0, 1, 2] > tile[0, 1, 0]  # red for more, blue for less
    assert (attention_tile(uniform) == tile[1, 1]).all()
    strong = torch.full((4, 4), 0.2 / 15)
    strong[0, 0] = 0.8
    more = attention_tile(strong)[0, 0]
    strong[0, 0], strong[3, 3] = 2 / 16, 0.8 - 2 / 16
    assert attention_tile(strong)[0, 0] == pytest.approx(tile[0, 0])  # whatever else is in the map
    assert more.sum() < tile[0, 0].sum()


def drawn(monkeypatch, module, draw):
    """The matplotlib figure behind the picture that draw() makes."""
    figures = []
    monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    draw()
    return figures[0]


def test_curves_show_every_number_of_the_log(monkeypatch):
    rows = [
        {"step": 0, "knn": 0.1, "note": "text"},
        {"step": 1, "loss": 2.0, "mse": 1.0, "lr": 0.1, "seconds": 3.0, "knn": 0.2},
    ]
    figure = drawn(monkeypatch, pictures, lambda: pictures.curves_picture(rows))
    shown = {axis.get_title(): [line.get_label() for line in axis.lines] for axis in figure.axes}
    assert shown == {
        "loss and its parts": ["loss", "mse"],
        "k-NN accuracy": ["knn"],
        "k-NN accuracy by time": ["knn"],
        "learning rate": ["lr"],
    }
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[1, 1]]
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[0, 0.1], [3 / 60, 0.2]]
    assert figure.axes[2].get_xlabel() == "minutes of training"
    monkeypatch.undo()
    assert pictures.curves_picture([{"step": 0}])[:4] == b"\x89PNG"


def test_pca_colours_are_the_three_largest_components_of_all_tokens():
    torch.manual_seed(0)
    planted = torch.rand(3, 2, 4, 4)  # two directions that vary, in three images
    basis = torch.linalg.qr(torch.randn(5, 5)).Q
    tokens = torch.einsum("n c y x, c d -> n d y x", planted * torch.tensor([9, 1]).view(2, 1, 1), basis[:2])
    colours = pca_colours(tokens + 7)  # the mean does not count
    assert colours.shape == (3, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    for i in range(2):
        pair = torch.stack([colours[..., i].flatten(), planted[:, i].flatten().double()])
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.97
    assert pca_colours(torch.ones(1, 5, 2, 2)).isfinite().all()
    assert pca_colours(torch.rand(1, 1, 2, 2)).shape == (1, 2, 2, 3)  # --dim=1


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "a$b$c", "$\\frac$", "日本"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_folders_may_be_any(name):
    picture = divergence_picture(torch.rand(1, 1), [name], torch.zeros(1).long(), torch.zeros(1).long())
    assert picture[:4] == b"\x89PNG"


def test_pictures_print_names_as_a_paper_does(monkeypatch):
    maps = torch.full((2, 4, 4), 1 / 16)
    panels = {
        name: {"mean of heads": maps, "60 %": maps > 0, "PCA": torch.rand(2, 4, 4, 3)}
        for name in ("dino", "barlow", "mine")
    }
    del panels["mine"]["60 %"]
    images, masks = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8)
    masks[0, :4] = 1
    figure = drawn(monkeypatch, evaluation_pictures, lambda: attention_picture(images, panels, masks))
    names = ["DINO", "Barlow Twins", "mine"]
    assert [text.get_text() for text in figure.texts] == 2 * names  # for each image, so that they compare
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "mean of heads", "60 %", "PCA"]
    assert len(figure.axes) == 2 * (1 + 3 * 3 - 1) + 1  # "mine" lacks a column; the colour bar
    d, groups = torch.rand(3, 3), torch.arange(3)
    names = ["hybrid_a", "hybrid_b", "mine"]
    figure = drawn(monkeypatch, evaluation_pictures, lambda: divergence_picture(d, names, groups, groups))
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == [
        "Hybrid A",
        "Hybrid B",
        "mine",
    ]

"""What a network must know about images to be built and to generate them, available without the data."""

from dataclasses import dataclass

from data.sets.images import Images


@dataclass(frozen=True)
class ImageForm:
    """Shape (C, H, W) of an image, number of classes, the VAE that decodes the images (None: they are pixels), and the
    identity that distinguishes them from others ("": not known)."""

    shape: tuple[int, int, int]
    num_classes: int
    vae: str | None
    identity: str = ""

    def as_record(self) -> dict:
        """Return the form as a dict for JSON, without the identity."""
        return {"shape": list(self.shape), "num_classes": self.num_classes, "vae": self.vae}


def form_of(images: Images) -> ImageForm:
    """Return the form of an image set."""
    return ImageForm(images.shape, images.num_classes, images.vae, images.identity)


def read_form(record: dict, identity: str = "") -> ImageForm:
    """Return the form that a record of `as_record` describes."""
    return ImageForm(tuple(record["shape"]), record["num_classes"], record["vae"], identity)

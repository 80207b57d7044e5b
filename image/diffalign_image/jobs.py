"""The image jobs that a YAML's top-level `type` can name."""

from diffalign_image.alignment import ImageAlign
from diffalign_image.best_of import ImageBestOf
from diffalign_image.composition import ImageCompose
from diffalign_image.distillation import ImageDistill
from diffalign_image.finetuning import ImageFinetune
from diffalign_image.preference import ImagePreference
from diffalign_image.pretraining import ImagePretrain
from diffalign_image.superposition import ImageSuperpose

JOBS = (ImagePretrain, ImageDistill, ImageAlign, ImagePreference, ImageCompose, ImageSuperpose, ImageBestOf,
        ImageFinetune)

"""The robot jobs that a YAML's top-level `type` can name."""

from diffalign_robot.alignment import RobotAlign
from diffalign_robot.cloning import RobotBC
from diffalign_robot.collection import RobotCollect

JOBS = (RobotCollect, RobotBC, RobotAlign)

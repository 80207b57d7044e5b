"""The robot jobs that a YAML's top-level `type` can name."""

from diffalign_robot.alignment import RobotAlign
from diffalign_robot.cloning import RobotBC
from diffalign_robot.collection import RobotCollect
from diffalign_robot.composition import RobotCompose
from diffalign_robot.importing import RobotImport
from diffalign_robot.improvement import RobotOffPolicy
from diffalign_robot.preference import RobotPreference
from diffalign_robot.recordings import RobotRecordings

JOBS = (RobotCollect, RobotBC, RobotImport, RobotAlign, RobotOffPolicy, RobotPreference, RobotCompose, RobotRecordings)

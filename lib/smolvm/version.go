package smolvm

import (
	"fmt"
	"regexp"
	"strconv"
	"sync"
)

// Version is a release of smolvm: major, minor, patch.
type Version [3]int

// Releases at which the command line changed. Source: smolvm's own tags up to
// 1.9.3. Later ones are the oldest release whose --help was read and has the flag:
// 1.12.0 has no --user, 1.15.0 no --credential, 1.27.3 no --error-format and
// 1.28.1 no --state-dir.
var (
	firstRelease     = Version{0, 1, 0}  // older: another project's numbers
	sinceMachine     = Version{0, 2, 0}  // "smolvm machine …"
	sinceCp          = Version{0, 5, 2}  // machine cp, exec --stream
	sinceNameFlag    = Version{1, 0, 2}  // --name on create and delete
	SinceMountSocket = Version{1, 6, 4}  // --mount-socket
	SinceSockets     = Version{1, 7, 5}  // mounted sockets that do not hang (fix 837)
	SinceContainers  = Version{1, 8, 0}  // mounted sockets that reach an image's container (fix 867)
	sinceLabel       = Version{1, 8, 0}  // --label
	SinceFork        = Version{1, 9, 1}  // copies that keep their container (fix 1009), more than one of a machine (888)
	SinceBranch      = Version{1, 32, 2} // "machine branch" as it was tried; it is there from 1.15 on
	sinceUser        = Version{1, 15, 0} // exec --user
	sinceCredential  = Version{1, 25, 2} // --credential
	sinceErrorFormat = Version{1, 28, 1} // --error-format json
	sinceStateDir    = Version{1, 31, 0} // --state-dir

	// NewestTested is the newest release that answers were recorded from. Newer
	// ones are taken to know what it knows, until they say otherwise.
	NewestTested = Version{1, 32, 2}
)

// InstallHint says how to get a release that can do all that is needed.
const InstallHint = "bottle-vm doctor --install smolvm installs 1.32.2 (the Python package smolmachines); BOTTLE_SMOLVM names it where another one is on PATH"

// Compiled when it is first needed: every start of a tool would pay for it.
var versionLine = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^smolvm (\d{1,6})\.(\d{1,6})\.(\d{1,6})(?:[-+.][0-9A-Za-z.+-]*)?$`)
})

// ParseVersion reads the line that "smolvm --version" prints: "smolvm X.Y.Z".
func ParseVersion(line string) (Version, error) {
	m := versionLine().FindStringSubmatch(line)
	if m == nil {
		return Version{}, fmt.Errorf("not a smolvm version: %q", bound(line, 80))
	}
	var v Version
	for i := range v {
		v[i], _ = strconv.Atoi(m[i+1]) // six digits at most: cannot fail
	}
	return v, nil
}

// Less tells whether v is older than o.
func (v Version) Less(o Version) bool {
	for i := range v {
		if v[i] != o[i] {
			return v[i] < o[i]
		}
	}
	return false
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

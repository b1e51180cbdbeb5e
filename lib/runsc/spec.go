//go:build linux

package runsc

import (
	"encoding/json"
	"fmt"
)

// ociVersion is the runtime-spec version whose field names are used here.
const ociVersion = "1.0.2"

// Spec is the part of an OCI runtime configuration (runtime-spec 1.0.2,
// config.json) that the bottle tools use.
type Spec struct {
	OCIVersion string  `json:"ociVersion"`
	Process    Process `json:"process"`
	Root       Root    `json:"root"`
	Hostname   string  `json:"hostname"`
	Mounts     []Mount `json:"mounts"`
	Linux      Linux   `json:"linux"`
}

type Process struct {
	Terminal        bool         `json:"terminal"`
	User            User         `json:"user"`
	Args            []string     `json:"args"`
	Env             []string     `json:"env"`
	Cwd             string       `json:"cwd"`
	Capabilities    Capabilities `json:"capabilities"`
	Rlimits         []Rlimit     `json:"rlimits,omitempty"`
	NoNewPrivileges bool         `json:"noNewPrivileges"`
}

type User struct {
	UID int `json:"uid"`
	GID int `json:"gid"`
}

type Capabilities struct {
	Bounding    []string `json:"bounding,omitempty"`
	Effective   []string `json:"effective,omitempty"`
	Inheritable []string `json:"inheritable,omitempty"`
	Permitted   []string `json:"permitted,omitempty"`
	Ambient     []string `json:"ambient,omitempty"`
}

type Rlimit struct {
	Type string `json:"type"`
	Hard uint64 `json:"hard"`
	Soft uint64 `json:"soft"`
}

type Root struct {
	Path     string `json:"path"`
	Readonly bool   `json:"readonly"`
}

type Mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options,omitempty"`
}

type Linux struct {
	Namespaces  []Namespace `json:"namespaces"`
	UIDMappings []IDMapping `json:"uidMappings"`
	GIDMappings []IDMapping `json:"gidMappings"`
}

type Namespace struct {
	Type string `json:"type"`
}

type IDMapping struct {
	ContainerID int `json:"containerID"`
	HostID      int `json:"hostID"`
	Size        int `json:"size"`
}

// Bind is a host file or folder in the container.
type Bind struct {
	Source, Target string
	ReadOnly       bool
	// NoExec has to be set where the source is mounted so: the flag cannot be
	// taken away in a user namespace, and the kernel refuses to try.
	NoExec bool
}

// Container is what differs from one bottle to the next.
type Container struct {
	Hostname         string
	Rootfs           string // host folder; never written to: an overlay in memory covers it
	Args, Env        []string
	User             User
	Capabilities     []string // of the first process
	UIDs, GIDs       []IDMapping
	Binds            []Bind // in mount order
	OpenFiles        uint64 // RLIMIT_NOFILE, also of every command executed later
	InternalCgroups  bool   // show the guest kernel's own cgroups (v2) at /sys/fs/cgroup
	WorkingDirectory string
}

// NewSpec builds the configuration. There is no network namespace entry: that
// and --network=none leave the guest without a device.
func NewSpec(c Container) *Spec {
	s := &Spec{
		OCIVersion: ociVersion,
		Process: Process{
			User: c.User, Args: c.Args, Env: nonNil(c.Env), Cwd: c.WorkingDirectory,
			Capabilities:    allCapabilities(c.Capabilities),
			Rlimits:         []Rlimit{{Type: "RLIMIT_NOFILE", Hard: c.OpenFiles, Soft: c.OpenFiles}},
			NoNewPrivileges: true,
		},
		Root:     Root{Path: c.Rootfs},
		Hostname: c.Hostname,
		Mounts:   systemMounts(c.InternalCgroups),
		Linux: Linux{
			Namespaces:  []Namespace{{"pid"}, {"mount"}, {"ipc"}, {"uts"}, {"user"}},
			UIDMappings: c.UIDs, GIDMappings: c.GIDs,
		},
	}
	for _, b := range c.Binds {
		s.Mounts = append(s.Mounts, bindMount(b))
	}
	return s
}

// NewProcess is a command for exec --process. It has no capability unless
// given: an empty set, and not a missing one, which would mean those of the
// first process.
func NewProcess(u User, args, env []string, cwd string, capabilities []string, terminal bool) *Process {
	return &Process{Terminal: terminal, User: u, Args: args, Env: nonNil(env), Cwd: cwd,
		Capabilities: allCapabilities(capabilities), NoNewPrivileges: true}
}

// Encode gives the JSON form.
func Encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("runsc: encoding plain data: %v", err))
	}
	return append(b, '\n')
}

// allCapabilities puts caps into every set. Ambient is what lets a process that
// starts as a plain user keep them when it is executed.
func allCapabilities(caps []string) Capabilities {
	return Capabilities{Bounding: caps, Effective: caps, Inheritable: caps, Permitted: caps, Ambient: caps}
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func systemMounts(cgroups bool) []Mount {
	ms := []Mount{
		{"/proc", "proc", "proc", []string{"nosuid", "noexec", "nodev"}},
		{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{"/dev/pts", "devpts", "devpts", []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
		{"/dev/shm", "tmpfs", "shm", []string{"nosuid", "noexec", "nodev", "mode=1777"}},
		{"/sys", "sysfs", "sysfs", []string{"nosuid", "noexec", "nodev", "ro"}},
		{"/tmp", "tmpfs", "tmpfs", []string{"nosuid", "nodev", "mode=1777"}},
		{"/run", "tmpfs", "tmpfs", []string{"nosuid", "nodev", "mode=755"}},
	}
	if cgroups {
		ms = append(ms, Mount{"/sys/fs/cgroup", "cgroup2", "cgroup2", []string{"nosuid", "noexec", "nodev"}})
	}
	return ms
}

// bindMount is recursive: a plain bind of a folder with further mounts below
// it is refused by the kernel inside of a user namespace.
func bindMount(b Bind) Mount {
	mode := "rw"
	if b.ReadOnly {
		mode = "ro"
	}
	options := []string{"rbind", mode, "nosuid", "nodev"}
	if b.NoExec {
		options = append(options, "noexec")
	}
	return Mount{b.Target, "bind", b.Source, options}
}
